#!/usr/bin/env bash
# Waits for a TPU, runs a job on it, and makes a new one when it is preempted: see --help.
set -uo pipefail
# shellcheck source=tpu/lib.sh
source "$(dirname "$0")/lib.sh"

if [[ ${1:---help} == --help ]]; then
  cat <<'TEXT'
usage: SETTING=VALUE ... tpu/queued_resource.sh JOB [FLAG ...]

Asks for a TPU slice as a queued resource, waits until it is there, and runs
`trainjax JOB FLAG ... --resume` on all of its hosts. When the slice is preempted, it is deleted, asked
for anew, and the job goes on from its newest whole checkpoint in the bucket. At the end the queued
resource and its TPU are deleted, however the script ends.

PROJECT, ZONE     of Google Cloud
TPU               a name for the queued resource and its TPU
BUCKET            of Cloud Storage; the folder /runs on every host, for --data and --out
ACCELERATOR       the slice's type                                     [v6e-16]
RUNTIME           the image of its hosts                               [v2-alpha-tpuv6e]
SPOT              1: cheaper, and preempted when others need it; 0: on demand  [1]
KEEP              1: do not delete it at the end; it is paid for until you do
LIBTPU_INIT_ARGS  XLA flags for the TPU; see tpu/README.md             []
MAX_RESTARTS      after which it gives up                              [100]
PAUSE             seconds before a restart on the same slice           [40]
POLL              seconds between two looks at the queue               [30]
TEXT
  exit 0
fi

need PROJECT ZONE TPU BUCKET
queue() { gcloud compute tpus queued-resources "$@" --project="$PROJECT" --zone="$ZONE"; }

# ACTIVE, WAITING_FOR_RESOURCES, ...; nothing where there is no such queued resource.
state() { queue describe "$TPU" --format='value(state.state)' 2>/dev/null; }

create() {
  local tier=(--spot)
  [[ ${SPOT:-1} == 1 ]] || tier=()
  queue create "$TPU" --node-id="$TPU" --accelerator-type="${ACCELERATOR:-v6e-16}" \
    --runtime-version="${RUNTIME:-v2-alpha-tpuv6e}" "${tier[@]}"
}

# Returns when the slice is there, whatever was of it before.
wait_for_slice() {
  local now before=
  while :; do
    now=$(state)
    [[ $now == "$before" ]] || echo "$TPU: ${now:-none}" >&2
    before=$now
    case $now in
      ACTIVE) return ;;
      "") create || fail "the queued resource $TPU could not be made; what failed is above" ;;
      FAILED)
        queue describe "$TPU" >&2
        fail "the queued resource $TPU failed, for the reason above"
        ;;
      SUSPENDED) queue delete "$TPU" --force --quiet ;;
      *) sleep "${POLL:-30}" ;;
    esac
  done
}

# shellcheck disable=SC2317,SC2329  # trap calls it
clean_up() {
  if [[ ${KEEP:-} == 1 ]]; then
    echo "kept and paid for: gcloud compute tpus queued-resources delete $TPU --force" \
      "--project=$PROJECT --zone=$ZONE" >&2
  elif [[ -n $(state) ]]; then
    queue delete "$TPU" --force --quiet ||
      echo "error: $TPU could not be deleted and is paid for; delete it by hand" >&2
  fi
}
trap clean_up EXIT
trap 'exit 143' TERM HUP
trap 'exit 130' INT

verdict=again status=1
for ((restart = 0; restart <= ${MAX_RESTARTS:-100}; restart++)); do
  wait_for_slice
  if prepare; then
    run_job "$@"
  fi
  [[ $verdict == again ]] || exit "$status"
  echo "the job was interrupted; restart $((restart + 1)) of at most ${MAX_RESTARTS:-100}" >&2
  sleep "${PAUSE:-40}" # also until a preemption is to be seen in the state
done
echo "error: given up after ${MAX_RESTARTS:-100} restarts" >&2
exit "$status"
