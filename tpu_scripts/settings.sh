# shellcheck shell=bash
# shellcheck disable=SC2153
# The second half of lib.sh: settings with their defaults, the backend, and what this machine remembers of a run.

[[ -r $CONFIG ]] || unusable "there is no $CONFIG; copy $HERE/config.env.example to it and edit, or give --config FILE"
# shellcheck source=config.env.example
source "$CONFIG"
: "${BACKEND:=queued}" "${CAPACITY:=spot}" "${NETWORK:=default}" "${SUBNETWORK:=}" "${SERVICE_ACCOUNT:=}"
: "${IMAGE_PROJECT:=ubuntu-os-accelerator-images}" "${COORDINATOR_PORT:=8476}" "${SECRETS_FILE:=}"
: "${LOCK_FILE:=$HERE/requirements-tpu.lock}" "${POLL_SECONDS:=30}" "${CREATE_SECONDS:=86400}" "${CREATE_TRIES:=5}"
: "${RETRY_SECONDS:=15}" "${SSH_TRIES:=5}" "${SSH_PARALLEL:=16}" "${SAVE_SECONDS:=300}" "${STALE_ATTEMPTS:=3}"
: "${UNKNOWN_POLLS:=10}" "${CHIPS_PER_WORKER:=4}"

need() {
  local name
  for name in "$@"; do [[ ${!name:-} ]] || unusable "$CONFIG does not set $name; see config.env.example"; done
}
need NAME RUN_DIR TRAIN_COMMAND NUM_WORKERS
[[ $NUM_WORKERS =~ ^[1-9][0-9]*$ ]] || unusable "NUM_WORKERS = $NUM_WORKERS in $CONFIG; give the number of hosts"
[[ -f $HERE/backends/$BACKEND.sh ]] || unusable "BACKEND = $BACKEND in $CONFIG; there are queued, mig and ssh"
: "${STATE_DIR:=$HOME/.local/state/rljax/$NAME}"
[[ $WORKERS ]] || WORKERS=$(seq 0 $((NUM_WORKERS - 1)))
[[ $DRY_RUN ]] || mkdir -p "$STATE_DIR"
# shellcheck source=backends/queued.sh
source "$HERE/backends/$BACKEND.sh"

no_arguments() { ((!${#ARGS[@]})) || unusable "$(basename "$0") does not know ${ARGS[*]}; --help says what it takes"; }

# Number of the newest attempt, four digits; 0000 before the first.
attempt() { cat "$STATE_DIR/attempt" 2>/dev/null || echo 0000; }

# "WORKER STATUS" of the newest attempt, a line each: running, exit CODE, or lost (killed without a word).
worker_statuses() {
  local lines
  lines=$(on_hosts bash .rljax/host.sh status "$(attempt)") || return
  [[ ! $DRY_RUN ]] || { for worker in $WORKERS; do echo "$worker exit 0"; done && return; }
  sed -nE 's/^\[([0-9]+)\] (running|lost|exit [0-9]+)$/\1 \2/p' <<<"$lines" | sort -n
}

# Step of the newest checkpoint, -1 if there is none.
newest_step() {
  local names
  if [[ $RUN_DIR == gs://* ]]; then
    names=$(ask "" gcloud storage ls "$RUN_DIR/checkpoints/" 2>/dev/null) || true
  else
    names=$(host_run 0 ls "$RUN_DIR/checkpoints" 2>/dev/null) || true
  fi
  sed -nE 's#^(.*/)?([0-9]+)/?$#\2#p' <<<"$names" | sort -n | tail -n 1 | grep . || echo -1
}
