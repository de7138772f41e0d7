#!/usr/bin/env bash
# Starts TRAIN_COMMAND on all hosts, detached: launch.sh [--dry-run] [--config FILE]
# Each launch is an attempt with a number; ~/.rljax/attempts/NUMBER on a host holds its log and exit code.
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
no_arguments

attempt=$(printf %04d $((10#$(attempt) + 1)))
[[ $DRY_RUN ]] || echo "$attempt" >"$STATE_DIR/attempt"
logs=-
[[ $RUN_DIR != gs://* ]] || logs=$RUN_DIR/logs
start() {
  host_run "$1" bash .rljax/host.sh start "$attempt" "$1" "$NUM_WORKERS" "$(coordinator)" "$logs" "$TRAIN_COMMAND"
}
each_worker start
note "attempt $attempt has begun"
