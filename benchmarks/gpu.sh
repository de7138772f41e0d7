#!/usr/bin/env bash
# Rollouts on a GPU against transformers, or updates against torch, on the same card: Qwen2.5 shapes, random weights,
# bfloat16, each in under ten minutes and without a network.
#
#   benchmarks/gpu.sh                         # rollouts, as far as the time allows
#   benchmarks/gpu.sh updates
#   benchmarks/gpu.sh 1.5b-b512 0.5b-update   # these rows
#   benchmarks/gpu.sh --rehearse              # the same path with tiny shapes on the CPU
#
# PYTHON           has JAX for CUDA and what rljax/ imports (python3); the checkout need not be installed
# BENCH_HF_PYTHON  has torch and transformers (PYTHON)
# BENCH_SECONDS    after which nothing more is measured (570)
# BENCH_COMMIT     recorded where the copy has no history
# BENCH_OUT        folder of the results (benchmarks/results)
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
BUDGET=${BENCH_SECONDS:-570}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

if [ "${1:-}" = --rehearse ]; then
  shift
  [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python
  [ -x .venv-hf/bin/python ] && export BENCH_HF_PYTHON=${BENCH_HF_PYTHON:-$PWD/.venv-hf/bin/python}
  export JAX_PLATFORMS=cpu
  rows=(rehearsal rehearsal-realistic rehearsal-update) repeats=1 more=(--busy)
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
else
  export JAX_PLATFORMS=cuda
  # Both processes hold their weights on one card: neither may take it all.
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
  export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-8}
  repeats=3 more=()
  case ${1:-rollouts} in
    rollouts) rows=(0.5b-b512 1.5b-b512 7b-b256) ;;
    updates) rows=(0.5b-update 1.5b-update) ;;
    *) rows=("$@") ;;
  esac
  out=${BENCH_OUT:-benchmarks/results}
fi
export BENCH_HF_PYTHON=${BENCH_HF_PYTHON:-$(command -v "$PYTHON")}

"$PYTHON" -c 'import jax; print(jax.__version__, jax.devices())'
"$BENCH_HF_PYTHON" -c 'import torch, transformers; print(torch.__version__, transformers.__version__)'
mapfile -t models < <(printf '%s\n' "${rows[@]%%-*}" | sed 's/^rehearsal$/tiny/' | awk '!seen[$0]++')
"$PYTHON" benchmarks/models.py bfloat16 "${models[@]}"
[ "$JAX_PLATFORMS" = cpu ] || export XLA_PYTHON_CLIENT_MEM_FRACTION=0.5

# One row after the other, each within what is left; lines are written row by row, so nothing measured is lost. Only the
# first row of rollouts tries the static cache of transformers: compiling it takes a minute for each shape.
failed=0 variants=()
for row in "${rows[@]}"; do
  left=$((BUDGET - SECONDS))
  if [ "$left" -le 30 ]; then
    echo "not run, the time is up: $row"
    failed=1
    continue
  fi
  case $row in
    *-update) run=(update.py --peer torch --out "$out/update.jsonl") ;;
    *)
      run=(sampling.py --peer hf "${variants[@]}" --out "$out/gpu.jsonl")
      variants=(--variants dynamic)
      ;;
  esac
  timeout -k 10 "$left" "$PYTHON" "benchmarks/${run[0]}" "${run[@]:1}" --cases "${row/rehearsal-update/rehearsal}" \
    --dtype bfloat16 --reps "$repeats" "${more[@]}" || { echo "$row: not complete" >&2; failed=1; }
  echo "$row: $SECONDS seconds since the start"
done

[ -s "$out/gpu.jsonl" ] && "$PYTHON" benchmarks/table.py --targets "$out/gpu.jsonl"
exit $failed
