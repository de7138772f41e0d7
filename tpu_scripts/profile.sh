#!/usr/bin/env bash
# Fetches the profiles of a run, RUN_DIR/profile, to this machine: profile.sh [--dry-run] [--config FILE] [DESTINATION]
# They are what jax.profiler.trace writes (*.xplane.pb); xprof shows them.
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
[[ ${#ARGS[@]} == 1 && ${ARGS[0]} != -* ]] || no_arguments

[[ $RUN_DIR == gs://* ]] || unusable "RUN_DIR = $RUN_DIR is no bucket; copy $RUN_DIR/profile from that disk"
destination=${ARGS[0]:-$STATE_DIR/profile}
run mkdir -p "$destination"
run gcloud storage rsync --recursive "$RUN_DIR/profile" "$destination"
[[ $DRY_RUN || $(find "$destination" -name '*.xplane.pb') ]] || die "there is no *.xplane.pb in $RUN_DIR/profile"
say "xprof --logdir=$destination"
