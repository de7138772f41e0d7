#!/usr/bin/env bash
# Installs the pinned packages on all hosts: setup.sh [--dry-run] [--config FILE] [--worker N]
# Also secrets and the scripts that run there. Again: changes only what differs.
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
no_arguments

if [[ $SECRETS_FILE ]]; then
  [[ -r $SECRETS_FILE ]] || unusable "SECRETS_FILE = $SECRETS_FILE cannot be read"
  [[ $(stat -c %a "$SECRETS_FILE") == [46]00 ]] || unusable "others may read $SECRETS_FILE; chmod 600 it"
fi

# Under the names they have on the hosts. The folder there is closed to others before a secret enters it.
staged=$STATE_DIR/staged
run install -d -m 700 "$staged"
run install -m 600 "$HERE/host.sh" "$HERE/host_setup.sh" "$staged"
run install -m 600 "$LOCK_FILE" "$staged/requirements.lock"
files=("$staged/host.sh" "$staged/host_setup.sh" "$staged/requirements.lock")
if [[ $SECRETS_FILE ]]; then
  [[ $DRY_RUN ]] || trap 'rm -f "$staged/env"' EXIT
  run install -m 600 "$SECRETS_FILE" "$staged/env"
  files+=("$staged/env")
fi
on_hosts mkdir -p -m 700 .rljax
each_worker host_copy "${files[@]}"
on_hosts bash .rljax/host_setup.sh install 3.12
note "set up"
