# shellcheck shell=bash
# Hosts that are there already, one a line in HOSTS_FILE: GPU nodes without a scheduler, or machines of your own.
need HOSTS_FILE
[[ -r $HOSTS_FILE ]] || unusable "HOSTS_FILE = $HOSTS_FILE cannot be read; write a line per host"
mapfile -t HOSTS < <(grep -v '^ *\(#\|$\)' "$HOSTS_FILE")
((${#HOSTS[@]} == NUM_WORKERS)) ||
  unusable "$HOSTS_FILE has ${#HOSTS[@]} hosts and NUM_WORKERS is $NUM_WORKERS; make them agree"
SSH=(-o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15)

pod_create() { :; }
pod_delete() { :; }
pod_state() { echo ACTIVE; }
pod_reason() { :; }
pod_size() { echo "${#HOSTS[@]}"; }
pod_costs() { say "nothing was created, so nothing was deleted: ${HOSTS[*]}"; }
host_ssh() { run ssh -n "${SSH[@]}" "${HOSTS[$1]}" "$2"; }
host_copy() { run scp -q "${SSH[@]}" "${@:2}" "${HOSTS[$1]}":.rljax/; }
coordinator() { echo "${HOSTS[0]#*@}:$COORDINATOR_PORT"; }
