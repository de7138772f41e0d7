#!/usr/bin/env bash
# What the pod and the newest attempt are doing: status.sh [--dry-run] [--config FILE]
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
no_arguments

class=$(pod_class)
say "pod $NAME: $class"
step=$(newest_step)
say "newest checkpoint: step $step"
if [[ $class == ready ]]; then
  statuses=$(worker_statuses)
  say "attempt $(attempt):"
  say "  worker ${statuses//$'\n'/$'\n'  worker }"
fi
if [[ -f $STATE_DIR/history ]]; then
  say "attempts that ended:"
  say "$(tail -n 5 "$STATE_DIR/history" | sed 's/^/  /')"
fi
