#!/usr/bin/env bash
# Makes a TPU VM of one host, runs a job on it, and deletes it: see --help.
set -uo pipefail
# shellcheck source=tpu/lib.sh
source "$(dirname "$0")/lib.sh"

if [[ ${1:---help} == --help ]]; then
  cat <<'TEXT'
usage: SETTING=VALUE ... tpu/single_host.sh JOB [FLAG ...]

Makes a TPU VM (or takes the one of this name), runs `trainjax JOB FLAG ... --resume` there as
pod_slice.sh does, and deletes the TPU when the script ends, however it ends.

PROJECT, ZONE     of Google Cloud
TPU               a name for the TPU
BUCKET            of Cloud Storage; the folder /runs on the host, for --data and --out
ACCELERATOR       its type, of one host                                [v6e-8]
RUNTIME           the image of its VM                                  [v2-alpha-tpuv6e]
KEEP              1: do not delete it at the end; it is paid for until you do
and those of pod_slice.sh
TEXT
  exit 0
fi

need PROJECT ZONE TPU BUCKET
# shellcheck disable=SC2317,SC2329  # trap calls it
clean_up() {
  if [[ ${KEEP:-} == 1 ]]; then
    echo "kept and paid for: gcloud compute tpus tpu-vm delete $TPU --project=$PROJECT --zone=$ZONE" >&2
  else
    vm delete "$TPU" --quiet
  fi
}
if ! vm describe "$TPU" >/dev/null 2>&1; then
  trap clean_up EXIT
  vm create "$TPU" --accelerator-type="${ACCELERATOR:-v6e-8}" --version="${RUNTIME:-v2-alpha-tpuv6e}" ||
    fail "the TPU $TPU could not be made; what failed is above"
fi
trap clean_up EXIT
trap 'exit 143' TERM HUP
trap 'exit 130' INT
"$(dirname "$0")/pod_slice.sh" "$@"
