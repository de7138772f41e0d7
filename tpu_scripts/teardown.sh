#!/usr/bin/env bash
# Deletes the pod, after asking: teardown.sh [--dry-run] [--config FILE] [--yes]
# Lists what is left and costs money: other machines of the project, and the bucket, which is never deleted.
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
[[ ${ARGS[*]} == --yes ]] || no_arguments

if [[ ! $DRY_RUN && ${ARGS[*]} != --yes ]]; then
  read -r -p "Delete $NAME and what only its disks hold? [y/N] " answer || true
  [[ $answer == [yY]* ]] || die "nothing was deleted"
fi
if [[ $DRY_RUN || $(pod_class) != absent ]]; then pod_delete; else note "there is no $NAME"; fi
say "What is left in the project:"
pod_costs
if [[ $RUN_DIR == gs://* ]]; then run gcloud storage du --summarize --readable-sizes "$RUN_DIR"; fi
