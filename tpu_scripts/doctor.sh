#!/usr/bin/env bash
# Is every host fit to train: doctor.sh [--dry-run] [--config FILE]
# Accelerators, same commit and packages, clock, 20 GiB of disk, the bucket written and read. May run beside a run.
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
no_arguments

bucket=-
[[ $RUN_DIR != gs://* ]] || bucket=$RUN_DIR
ill=0 before=$(date +%s)
bad() { echo "ILL: $*" && ill=1; }
facts=$(on_hosts bash .rljax/host_setup.sh check "$bucket") || bad "not every host answered"
after=$(date +%s)
[[ ! $DRY_RUN ]] || exit 0

values() { sed -nE "s/^\[([0-9]+)\] $1 (.*)/\1 \2/p" <<<"$facts" | sort -n; }
for fact in commit lock; do
  [[ $(values $fact | cut -d " " -f 2 | sort -u | wc -l) == 1 ]] ||
    bad "hosts differ in their $fact: $(values $fact | tr '\n' ';') sync.sh and setup.sh make them equal"
  [[ $(values $fact) != *none* ]] || bad "a host has no $fact; sync.sh and setup.sh bring it"
done
while read -r worker chips; do
  [[ $chips == "$CHIPS_PER_WORKER" ]] || bad "worker $worker has $chips chips, CHIPS_PER_WORKER is $CHIPS_PER_WORKER"
done < <(values chips)
while read -r worker clock; do
  ((clock >= before - 5 && clock <= after + 5)) || bad "the clock of worker $worker is $((clock - after)) s off"
done < <(values clock)
while read -r worker free; do
  ((free >= 20)) || bad "worker $worker has $free GiB of disk left"
done < <(values free)
while read -r worker verdict; do
  [[ $verdict == fine ]] || bad "worker $worker cannot write, read and describe $bucket; see the roles in README.md"
done < <(values bucket)
((!ill)) && echo "all $NUM_WORKERS workers are well: $((NUM_WORKERS * CHIPS_PER_WORKER)) chips"
