#!/usr/bin/env bash
# What the other scripts call on a host, from ~/.rljax: unpack, start, status, log, stop.
# An attempt is a folder attempts/0001 with log, pid and, once the program has ended, exit: its exit code.
set -euo pipefail
umask 077
cd "$HOME/.rljax"
export PATH="$HOME/.rljax/venv/bin:$HOME/.local/bin:$PATH"
self=$HOME/.rljax/host.sh boot=/proc/sys/kernel/random/boot_id

# pid_of ATTEMPT: of its wrapper, which is that of its session; nothing after a reboot, when it may be any program's.
pid_of() { [[ $(cat "attempts/$1/boot" 2>/dev/null) == "$(<"$boot")" ]] && cat "attempts/$1/pid"; }
alive() {
  local pid
  pid=$(pid_of "$1") && grep -qs host.sh "/proc/$pid/cmdline"
}

# unpack COMMIT: code.tar.gz takes the place of the code that was there.
unpack() {
  rm -rf code.new && mkdir code.new && tar -xzf code.tar.gz -C code.new && echo "$1" >code.new/COMMIT
  rm -rf code && mv code.new code
  # The command `rljax` and the version that checkpoints name; its packages are those of setup.sh.
  uv pip install --quiet --python venv --no-deps --editable code
}

# start ATTEMPT WORKER NUM_WORKERS COORDINATOR LOGS COMMAND: in a session of its own, which outlives the connection.
start() {
  local other
  for other in attempts/*/; do
    other=$(basename "$other")
    if [[ $other != "$1" ]] && alive "$other"; then
      echo "attempt $other still runs here; stop it first" >&2 && exit 1
    fi
  done
  mkdir -p attempts
  mkdir "attempts/$1" 2>/dev/null || exit 0 # a connection that broke after it had started is tried again
  cat "$boot" >"attempts/$1/boot"
  setsid nohup bash "$self" work "$@" </dev/null >"attempts/$1/wrapper" 2>&1 &
  echo $! >"attempts/$1/pid"
}

# The wrapper: passes SIGTERM on to the program, and writes down how it ended. A shell of its own runs the program in
# the foreground and has its exit code: `wait` may lose it when a signal comes as the program ends.
work() {
  local attempt=$1 logs=$5 command=$6 runner
  export RLJAX_ATTEMPT=$attempt RLJAX_WORKER=$2 RLJAX_NUM_WORKERS=$3
  if [[ $4 != - ]]; then export JAX_COORDINATOR_ADDRESS=$4 JAX_NUM_PROCESSES=$3 JAX_PROCESS_ID=$2; fi
  if [[ -f env ]]; then # shellcheck disable=SC1091
    set -a && source ./env && set +a
  fi
  ulimit -n "$(ulimit -Hn)"
  (
    trap : TERM # sent to all at a shutdown: the program is waited for
    code=0
    (cd code && exec bash -c "$command") >"attempts/$attempt/log" 2>&1 || code=$?
    echo "$code" >"attempts/$attempt/exit.new"
  ) &
  runner=$!
  # The program is the one child of that shell; it is not there yet when the signal comes at once.
  trap 'until pkill -TERM -P "$runner" || ! kill -0 "$runner" 2>/dev/null; do sleep 0.1; done' TERM
  while kill -0 "$runner" 2>/dev/null; do wait "$runner" || true; done
  mv "attempts/$attempt/exit.new" "attempts/$attempt/exit"
  [[ $logs == - ]] || gcloud storage cp "attempts/$attempt/log" "$logs/$attempt/worker-$2.log"
}

status() {
  if [[ -f attempts/$1/exit ]]; then
    echo "exit $(cat "attempts/$1/exit")"
  elif alive "$1"; then echo running; else echo lost; fi
}

log() { tail -n "$2" ${3:+"$3"} "attempts/$1/log"; }

# stop ATTEMPT SECONDS: SIGTERM, so that it saves; SIGKILL to all that is left after so many seconds. Then the lock of
# libtpu, which a killed program leaves behind, and which would keep the next one from the TPU.
stop() {
  local pid end=$((SECONDS + $2))
  if pid=$(pid_of "$1"); then
    ! alive "$1" || kill -TERM "$pid"
    while alive "$1" && ((SECONDS < end)); do sleep 0.2; done
    kill -KILL -- "-$pid" 2>/dev/null || true
  fi
  [[ ! -d attempts/$1 || -f attempts/$1/exit ]] || echo 137 >"attempts/$1/exit"
  rm -f "${TMPDIR:-/tmp}/libtpu_lockfile"
  status "$1"
}

"$@"
