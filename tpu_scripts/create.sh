#!/usr/bin/env bash
# Asks for the pod and waits until all its hosts are there: create.sh [--dry-run] [--config FILE]
# A pod that is there already is left as it is. Fails with the reason the cloud gives, or after CREATE_SECONDS.
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
no_arguments

class=absent
[[ $DRY_RUN ]] || class=$(pod_class)
case $class in
  ready | waiting) note "$NAME has been asked for already" ;;
  absent) pod_create ;;
  gone) die "$NAME was preempted or failed; teardown.sh removes it, supervise.sh does that by itself" ;;
  *) die "what describe says of $NAME makes no sense (above), so nothing was created" ;;
esac

end=$((SECONDS + CREATE_SECONDS)) unknown=0
while class=$(pod_class) && [[ $class != ready ]]; do
  [[ $class == unknown ]] && unknown=$((unknown + 1)) || unknown=0
  ((unknown < UNKNOWN_POLLS)) || die "what describe says of $NAME made no sense $unknown times in a row"
  if [[ $class == gone ]]; then
    pod_reason >&2
    die "$NAME could not be had; the reason is above"
  fi
  ((SECONDS < end)) || die "$NAME is not there after $CREATE_SECONDS s; the request stands, teardown.sh withdraws it"
  sleep "$POLL_SECONDS"
done

size=$(pod_size)
[[ $size == "$NUM_WORKERS" ]] ||
  die "$NAME has ${size:-an unknown number of} workers and NUM_WORKERS is $NUM_WORKERS; correct $CONFIG, or teardown.sh"
note "$NAME is there, $NUM_WORKERS workers"
