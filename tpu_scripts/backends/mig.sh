# shellcheck shell=bash
# shellcheck disable=SC2153
# A managed instance group of Compute Engine that is one slice: v5p, v6e, TPU7x.
need PROJECT ZONE MACHINE_TYPE TOPOLOGY IMAGE_FAMILY
WHERE=(--zone="$ZONE" --project="$PROJECT")
REGION=${ZONE%-*}
NAMES=$STATE_DIR/instances # as last asked, or each connection would ask again
[[ ! $DRY_RUN ]] || NAMES=/dev/null

pod_create() {
  local flags=(--project="$PROJECT" --machine-type="$MACHINE_TYPE" --maintenance-policy=TERMINATE)
  flags+=(--image-family="$IMAGE_FAMILY" --image-project="$IMAGE_PROJECT" --network="$NETWORK")
  [[ ! $SUBNETWORK ]] || flags+=(--subnet="$SUBNETWORK" --region="$REGION")
  [[ ! $SERVICE_ACCOUNT ]] || flags+=(--service-account="$SERVICE_ACCOUNT" --scopes=cloud-platform)
  case $CAPACITY in
    spot) flags+=(--provisioning-model=SPOT --instance-termination-action=STOP) ;;
    reserved)
      need RESERVATION
      flags+=(--provisioning-model=RESERVATION_BOUND --reservation-affinity=specific --reservation="$RESERVATION")
      ;;
    on-demand) flags+=(--provisioning-model=STANDARD) ;;
    *) unusable "CAPACITY = $CAPACITY in $CONFIG; give spot, reserved or on-demand" ;;
  esac
  # The first two outlive a preemption, cost nothing, and are there already when the group is made again.
  unless_there resource-policies describe "$NAME" --region="$REGION" --project="$PROJECT" ||
    run gcloud compute resource-policies create workload-policy "$NAME" --region="$REGION" --project="$PROJECT" \
      --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY"
  unless_there instance-templates describe "$NAME" --project="$PROJECT" ||
    run gcloud compute instance-templates create "$NAME" "${flags[@]}"
  # do-nothing: a stopped machine alone is no use, the slice is made again as a whole.
  run gcloud compute instance-groups managed create "$NAME" "${WHERE[@]}" --size="$NUM_WORKERS" --template="$NAME" \
    --workload-policy="projects/$PROJECT/regions/$REGION/resourcePolicies/$NAME" \
    --default-action-on-vm-failure=do-nothing
}

unless_there() { [[ ! $DRY_RUN ]] && gcloud compute "$@" >/dev/null 2>&1; }

pod_delete() { run gcloud compute instance-groups managed delete "$NAME" "${WHERE[@]}" --quiet; }

# "NAME STATUS" of each machine, by name. Names are not known before they exist: a dry run makes some up.
instances() {
  local assumed
  assumed=$(for ((i = 0; i < NUM_WORKERS; i++)); do echo "INSTANCE-$i RUNNING"; done)
  ask "$assumed" gcloud compute instance-groups managed list-instances "$NAME" "${WHERE[@]}" \
    --format="value(instance.basename(),instanceStatus)" | tr '\t' ' ' | sort | tee "$NAMES"
}

# ACTIVE when all run, else the worst status of a machine.
pod_state() {
  local lines errors status
  errors=$(mktemp)
  if lines=$(instances 2>"$errors"); then
    status=$(awk '{print $2}' <<<"$lines" | sort -u | tr '\n' ' ')
    case " $status" in
      *" STOP"* | *" SUSPEND"* | *" TERMINATED "* | *" DELETING "*) echo SUSPENDED ;;
      *" STAGING "* | *" PROVISIONING "* | "  ") echo PROVISIONING ;;
      " RUNNING ") echo ACTIVE ;;
      *) echo "$status" ;;
    esac
  elif grep -qi "not.\?found" "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
  fi
  rm "$errors"
}

pod_reason() { run gcloud compute instance-groups managed list-errors "$NAME" "${WHERE[@]}"; }
pod_size() { instances | grep -c .; }

pod_costs() {
  run gcloud compute instance-groups managed list --project="$PROJECT"
  run gcloud compute instances list --project="$PROJECT"
}

instance() {
  local lines
  if [[ -s $NAMES ]]; then lines=$(cat "$NAMES"); else lines=$(instances 3>/dev/null); fi
  sed -n "$(($1 + 1))s/ .*//p" <<<"$lines"
}
host_ssh() { run gcloud compute ssh "$(instance "$1")" "${WHERE[@]}" --command="$2" --quiet; }
host_copy() { run gcloud compute scp "${@:2}" "$(instance "$1")":.rljax/ "${WHERE[@]}" --quiet; }
coordinator() { echo -; } # the TPU tells JAX
