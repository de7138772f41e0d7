#!/usr/bin/env bash
# Ends the newest attempt: stop.sh [--dry-run] [--config FILE]
# SIGTERM, so that it saves; SIGKILL to what is left after SAVE_SECONDS; then the stale lock of libtpu is removed.
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
no_arguments

on_hosts bash .rljax/host.sh stop "$(attempt)" "$SAVE_SECONDS"
