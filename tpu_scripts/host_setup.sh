#!/usr/bin/env bash
# What setup.sh and doctor.sh call on a host, from ~/.rljax: install PYTHON, or check BUCKET.
set -euo pipefail
umask 077
cd "$HOME/.rljax"
export PATH="$HOME/.local/bin:$PATH"

# install PYTHON: an environment with the packages of requirements.lock, by hash. Again: only what changed.
install() {
  [[ ! -f env ]] || chmod 600 env
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv==0.13.8
  [[ -x venv/bin/python ]] || uv venv --quiet --python "$1" venv
  if [[ $(cat lock.installed 2>/dev/null) != "$(sha256sum <requirements.lock)" ]]; then
    uv pip install --quiet --python venv --require-hashes --requirements requirements.lock
    sha256sum <requirements.lock >lock.installed
  fi
  # JAX asks for huge pages on a TPU host; not where nobody may set them.
  sudo -n sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' ||
    echo "huge pages were left as they are" >&2
}

# check BUCKET: facts, one a line; doctor.sh judges them.
check() {
  local probe word=rljax-doctor
  echo "commit $(cat code/COMMIT 2>/dev/null || echo none)"
  echo "lock $(cut -c 1-12 lock.installed 2>/dev/null || echo none)"
  echo "chips $(chips)"
  echo "clock $(date +%s)"
  echo "free $(df --output=avail -BG . | tail -n 1 | tr -dc 0-9)"
  [[ $1 != - ]] || return 0
  probe=$1/.doctor-$(hostname)-$$
  if gcloud storage buckets describe "$(cut -d / -f 1-3 <<<"$1")" --format="value(name)" >/dev/null &&
    echo "$word" | gcloud storage cp - "$probe" && [[ $(gcloud storage cat "$probe") == "$word" ]] &&
    gcloud storage rm "$probe"; then
    echo "bucket fine"
  else
    echo "bucket failed"
  fi
}

# Accelerators by the list of devices of this JAX, or of nvidia-smi. A TPU is not opened: it may be at work.
chips() {
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus | wc -l
  else
    venv/bin/python -c \
      'from jax._src import hardware_utils; print(hardware_utils.num_available_tpu_chips_and_device_id()[0])' || echo 0
  fi
}

"$@"
