#!/usr/bin/env bash
# Log of an attempt: logs.sh [--dry-run] [--config FILE] [--worker N] [--attempt N] [--lines N] [--follow | --save]
# Of all workers without --worker, lines marked [N]. --save: whole, into STATE_DIR/logs. Once an attempt has ended, its
# logs are in RUN_DIR/logs too if that is a bucket.
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"

number=$(attempt) lines=50 follow=() save=""
while ((${#ARGS[@]})); do
  case ${ARGS[0]} in
    --attempt) number=$(printf %04d "$((10#${ARGS[1]:?a number follows --attempt}))") && ARGS=("${ARGS[@]:1}") ;;
    --lines) lines=${ARGS[1]:?a number follows --lines} && ARGS=("${ARGS[@]:1}") ;;
    --follow) follow=(-F) ;;
    --save) save=1 lines=+1 ;;
    *) no_arguments ;;
  esac
  ARGS=("${ARGS[@]:1}")
done

if [[ ! $save ]]; then
  on_hosts bash .rljax/host.sh log "$number" "$lines" "${follow[@]}"
  exit
fi
save_one() {
  [[ $DRY_RUN ]] || exec >"$STATE_DIR/logs/$number/worker-$1.log"
  host_run "$1" bash .rljax/host.sh log "$number" "$lines"
}
run mkdir -p "$STATE_DIR/logs/$number"
each_worker save_one
say "$STATE_DIR/logs/$number"
