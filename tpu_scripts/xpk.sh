#!/usr/bin/env bash
# The same run on a GKE cluster that xpk made: xpk.sh [--dry-run] [--config FILE]
# CLUSTER, TPU_TYPE (v6e-16, tpu7x-16) and IMAGE come from the config. Secrets are not passed, xpk would write them into
# the JobSet for all to read; bind the cluster's service account to what the run may use.
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
no_arguments
need PROJECT ZONE CLUSTER TPU_TYPE IMAGE

# xpk does not look at exit codes: a bad config is tried as often as a preempted run.
run xpk workload create --workload="$NAME" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --tpu-type="$TPU_TYPE" --num-slices=1 --docker-image="$IMAGE" --max-restarts=20 --restart-on-user-code-failure \
  --termination-grace-period-seconds="$SAVE_SECONDS" --command="$TRAIN_COMMAND"
