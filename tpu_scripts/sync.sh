#!/usr/bin/env bash
# Sends the newest commit of this repository to all hosts: sync.sh [--dry-run] [--config FILE] [--worker N]
# What is not committed is not sent: a run is of a commit, which the hosts keep in code/COMMIT.
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
no_arguments

root=$(dirname "$HERE") archive=$STATE_DIR/code.tar.gz
[[ $DRY_RUN || ! $(git -C "$root" status --porcelain) ]] || note "uncommitted changes of $root are not sent"
commit=$(ask COMMIT git -C "$root" rev-parse HEAD)
run git -C "$root" archive --format=tar.gz --output="$archive" "$commit"
each_worker host_copy "$archive"
on_hosts bash .rljax/host.sh unpack "$commit"
note "commit $commit is there"
