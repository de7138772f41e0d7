#!/usr/bin/env bash
# Keeps a run going until it is done: supervise.sh [--dry-run] [--config FILE]
# Makes the pod, sets it up, launches, and watches. A pod that was preempted is made again; a program that ended with
# 75, 70, 134 or 137 is launched again and resumes. Gives up (1) after STALE_ATTEMPTS without a new checkpoint, and at
# once, with the program's own exit code, on any other. Stopped itself, it harms nothing: started again, it goes on.
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
no_arguments

give_up() { CODE=${2:-1} die "$1. If $NAME still exists it still costs money: status.sh, logs.sh, teardown.sh"; }

# A pod that is ready and set up. Deleted are pods that are gone, that `recreate` asks for, or that were made here; not
# one that was found with, say, the wrong number of workers, and never one that describe makes no sense of.
prepare() {
  local try class=absent made=""
  for ((try = 1; try <= CREATE_TRIES; try++)); do
    [[ $DRY_RUN ]] || class=$(pod_class)
    if [[ $class == gone ]] || [[ $recreate && $class == @(ready|waiting) ]]; then
      note "deleting $NAME ($class)"
      if pod_delete; then class=absent; else note "that failed"; fi
    fi
    [[ $class != absent ]] || made=1
    if "$HERE/create.sh" && "$HERE/setup.sh" && "$HERE/sync.sh"; then
      recreate="" fresh="" && return
    fi
    recreate=$made
    note "try $try of $CREATE_TRIES to make $NAME and set it up failed"
    sleep "$RETRY_SECONDS"
  done
  give_up "$NAME could not be made and set up in $CREATE_TRIES tries"
}

# Of the exit codes given: done, relaunch, or the code to give up with. One worker that was killed makes others fail in
# ways of their own, so one code that may be tried again decides, unless another says that trying is useless.
verdict() {
  local code all=" $* "
  for code in 64 71 72; do [[ $all != *" $code "* ]] || { echo "$code" && return; }; done
  for code in 75 70 134 137; do [[ $all != *" $code "* ]] || { echo relaunch && return; }; done
  for code in "$@"; do ((code == 0)) || { echo "$code" && return; }; done
  echo 'done'
}

# Looks at the attempt until it has ended; sets `outcome`: recreate, or a verdict. Some that ended wait for the others
# no longer than SAVE_SECONDS.
watch() {
  local statuses codes unknown=0 silent=0 ended=""
  while :; do
    [[ $DRY_RUN ]] || sleep "$POLL_SECONDS"
    case $(pod_class) in
      gone | absent) outcome=recreate && return ;;
      ready) unknown=0 ;;
      *)
        ((++unknown < UNKNOWN_POLLS)) || give_up "what describe says of $NAME made no sense $unknown times in a row"
        continue
        ;;
    esac
    if ! statuses=$(worker_statuses) || (($(wc -l <<<"$statuses") < NUM_WORKERS)); then
      ((++silent < UNKNOWN_POLLS)) || { outcome=recreate && return; }
      continue
    fi
    silent=0
    codes=$(sed -E 's/^[0-9]+ //; s/^lost/exit 137/' <<<"$statuses" | sed -n 's/^exit //p' | tr '\n' ' ')
    if [[ $statuses == *running* ]]; then
      [[ ${codes//[ 0]/} ]] || continue
      : "${ended:=$SECONDS}"
      ((SECONDS - ended >= SAVE_SECONDS)) || continue
      note "some ended with $codes and others hang: stopping those"
      "$HERE/stop.sh" || true
      continue
    fi
    # shellcheck disable=SC2086
    outcome=$(verdict $codes) && note "exit codes: $codes" && return
  done
}

recreate="" fresh=1 stale=0 best=$(newest_step) outcome=""
while :; do
  if [[ $fresh && ! $DRY_RUN && $(pod_class) == ready ]] && [[ $(worker_statuses 2>/dev/null) == *running* ]]; then
    note "attempt $(attempt) is running: watching it" && fresh="" && watch
  else
    [[ ! $fresh && ! $recreate ]] || prepare
    outcome=recreate
    if "$HERE/launch.sh"; then watch; else "$HERE/stop.sh" || true; fi
  fi
  step=$(newest_step)
  [[ $DRY_RUN ]] || echo "$(attempt) $outcome, newest checkpoint: step $step" >>"$STATE_DIR/history"
  note "attempt $(attempt): $outcome, newest checkpoint: step $step"
  case $outcome in
    done) exit 0 ;;
    relaunch) "$HERE/stop.sh" || true ;; # clears what is left of it
    recreate) recreate=1 ;;
    *) give_up "the program ended with exit code $outcome, which another try would not change" "$outcome" ;;
  esac
  if ((step > best)); then best=$step stale=0; else stale=$((stale + 1)); fi
  ((stale < STALE_ATTEMPTS)) || give_up "$stale attempts without a new checkpoint after step $best"
done
