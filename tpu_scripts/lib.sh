# shellcheck shell=bash
# Shared by the scripts: `source lib.sh` with their arguments reads flags and config and loads the backend.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec 3>&1 # dry runs print here, from inside $(...) too

note() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2 && exit "${CODE:-1}"; }
unusable() { CODE=64 die "$@"; } # as `rljax`: trying again will not help

# Words as one line that a shell reads as those words.
quoted() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# run WORD...: does it; a dry run prints it instead. ask ANSWER WORD...: its output; a dry run assumes ANSWER.
# say WORD...: echo, but not in a dry run, of which only commands are shown.
say() { [[ $DRY_RUN ]] || echo "$@"; }
run() { if [[ $DRY_RUN ]]; then quoted "$@" >&3; else "$@"; fi; }
ask() { if [[ $DRY_RUN ]]; then quoted "${@:2}" >&3 && echo "$1"; else "${@:2}"; fi; }

# Does a command again while ssh itself fails (255), which hosts that have just come up do.
tried() {
  local try code
  for ((try = 1; ; try++)); do
    code=0
    "$@" || code=$?
    ((code == 255 && try < SSH_TRIES)) || return "$code"
    sleep "$RETRY_SECONDS"
  done
}

# each_worker FUNCTION WORD...: FUNCTION WORKER WORD... for all workers, or the one of --worker, side by side. Output
# lines begin with [WORKER]. Fails if one does, naming it.
each_worker() {
  local worker code failed="" folder
  if [[ $DRY_RUN ]]; then
    for worker in $WORKERS; do "$1" "$worker" "${@:2}"; done
    return
  fi
  folder=$(mktemp -d)
  for worker in $WORKERS; do
    while (($(jobs -rp | wc -l) >= SSH_PARALLEL)); do wait -n || true; done
    { code=0; tried "$1" "$worker" "${@:2}" || code=$?; echo "$code" >"$folder/$worker"; } \
      > >(sed -u "s/^/[$worker] /") 2> >(sed -u "s/^/[$worker] /" >&2) 3>&- &
  done
  wait
  for worker in $WORKERS; do
    code=$(cat "$folder/$worker")
    ((code == 0)) || failed+=" $worker (exit code $code)"
  done
  rm -r "$folder"
  [[ ! $failed ]] || { echo "failed on worker$failed" >&2 && return 1; }
}

# host_run WORKER WORD...: a command on one host. on_hosts WORD...: on all.
host_run() { host_ssh "$1" "$(quoted "${@:2}")"; }
on_hosts() { each_worker host_run "$@"; }

# ready, waiting, gone (preempted, failed, being deleted), absent, or unknown: an answer that makes no sense.
pod_class() {
  case $(pod_state) in
    ACTIVE) echo ready ;;
    WAITING_FOR_RESOURCES | ACCEPTED | CREATING | PROVISIONING) echo waiting ;;
    SUSPENDING | SUSPENDED | FAILED | PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING) echo gone ;;
    ABSENT) echo absent ;;
    *) echo unknown ;;
  esac
}

DRY_RUN=${DRY_RUN:-} CONFIG=${CONFIG:-$HERE/config.env} WORKERS="" ARGS=()
while (($#)); do
  case $1 in
    --dry-run) DRY_RUN=1 ;;
    --config | --worker)
      (($# > 1)) || unusable "$1 wants a value"
      if [[ $1 == --config ]]; then CONFIG=$2; else WORKERS=${2/all/}; fi
      shift
      ;;
    --help | -h) sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    *) ARGS+=("$1") ;;
  esac
  shift
done
export DRY_RUN CONFIG
source "$HERE/settings.sh"
