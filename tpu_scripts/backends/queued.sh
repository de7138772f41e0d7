# shellcheck shell=bash
# Queued resources of the Cloud TPU API: v4, v5e, v5p, v6e.
need PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION
WHERE=(--zone="$ZONE" --project="$PROJECT")

pod_create() {
  local flags=(--node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION")
  flags+=(--network="$NETWORK")
  [[ ! $SUBNETWORK ]] || flags+=(--subnetwork="$SUBNETWORK")
  [[ ! $SERVICE_ACCOUNT ]] || flags+=(--service-account="$SERVICE_ACCOUNT")
  case $CAPACITY in
    spot | reserved) flags+=(--"$CAPACITY") ;;
    on-demand) ;;
    *) unusable "CAPACITY = $CAPACITY in $CONFIG; give spot, reserved or on-demand" ;;
  esac
  run gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" "${flags[@]}"
}

# --force: with the machines.
pod_delete() { run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet; }

pod_state() {
  local answer errors
  errors=$(mktemp)
  if answer=$(ask ACTIVE gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    --format="value(state.state)" 2>"$errors"); then
    echo "$answer"
  elif grep -qi "not.\?found" "$errors"; then
    echo ABSENT
  else
    cat "$errors" >&2
  fi
  rm "$errors"
}

pod_reason() {
  run gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format="yaml(state)"
}

pod_size() {
  ask "$NUM_WORKERS" gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" --format="value(networkEndpoints.len())"
}

pod_costs() {
  run gcloud compute tpus queued-resources list "${WHERE[@]}"
  run gcloud compute tpus tpu-vm list "${WHERE[@]}"
}

host_ssh() { run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker="$1" --command="$2" --quiet; }

# host_copy WORKER FILE...: into ~/.rljax of one host.
host_copy() { run gcloud compute tpus tpu-vm scp "${@:2}" "$NAME":.rljax/ "${WHERE[@]}" --worker="$1" --quiet; }

coordinator() { echo -; } # the TPU tells JAX
