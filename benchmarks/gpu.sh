#!/usr/bin/env bash
# Rollouts on a GPU against transformers on the same card: Qwen2.5 shapes, random weights, bfloat16, in under ten minutes
# and without a network.
#
#   benchmarks/gpu.sh                     # all rows, as far as the time allows
#   benchmarks/gpu.sh 1.5b-b512           # these rows
#   benchmarks/gpu.sh --rehearse          # the same path with tiny shapes on the CPU
#
# PYTHON           has JAX for CUDA and what rljax/ imports (python3); the checkout need not be installed
# BENCH_HF_PYTHON  has torch and transformers (PYTHON)
# BENCH_SECONDS    after which nothing more is measured (570)
# BENCH_COMMIT     recorded where the copy has no history
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
  rows=(rehearsal rehearsal-realistic) models=(tiny) repeats=1 more=(--busy)
  out=$(mktemp -d)/gpu.jsonl
  trap 'rm -rf "$(dirname "$out")"' EXIT
else
  export JAX_PLATFORMS=cuda
  # Both processes hold their weights on one card: neither may take it all.
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
  rows=(1.5b-b512 7b-b256 0.5b-b512) repeats=3 more=()
  [ $# -gt 0 ] && rows=("$@")
  mapfile -t models < <(printf '%s\n' "${rows[@]%%-*}" | awk '!seen[$0]++')
  out=benchmarks/results/gpu.jsonl
fi
export BENCH_HF_PYTHON=${BENCH_HF_PYTHON:-$(command -v "$PYTHON")}

"$PYTHON" -c 'import jax; print(jax.__version__, jax.devices())'
"$BENCH_HF_PYTHON" -c 'import torch, transformers; print(torch.__version__, transformers.__version__)'
"$PYTHON" benchmarks/models.py bfloat16 "${models[@]}"
[ "$JAX_PLATFORMS" = cpu ] || export XLA_PYTHON_CLIENT_MEM_FRACTION=0.5

# One model after the other, each within what is left; lines are written row by row, so nothing measured is lost.
failed=0
for model in "${models[@]}"; do
  mine=()
  for row in "${rows[@]}"; do
    if [ "${row%%-*}" = "$model" ] || [ "$model" = tiny ]; then mine+=("$row"); fi
  done
  left=$((BUDGET - SECONDS))
  if [ "$left" -le 30 ]; then
    echo "not run, the time is up: ${mine[*]}"
    failed=1
    continue
  fi
  timeout -k 10 "$left" "$PYTHON" benchmarks/sampling.py --cases "${mine[@]}" --dtype bfloat16 --peer hf \
    --reps "$repeats" --out "$out" "${more[@]}" || { echo "${mine[*]}: not complete" >&2; failed=1; }
done

[ -s "$out" ] && "$PYTHON" benchmarks/table.py --targets "$out"
echo "$SECONDS seconds"
exit $failed
