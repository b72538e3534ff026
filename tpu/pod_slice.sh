#!/usr/bin/env bash
# Runs a job on all hosts of a TPU that is there: see --help.
set -uo pipefail
# shellcheck source=tpu/lib.sh
source "$(dirname "$0")/lib.sh"

if [[ ${1:---help} == --help ]]; then
  cat <<'TEXT'
usage: SETTING=VALUE ... tpu/pod_slice.sh JOB [FLAG ...]

Runs `trainjax JOB FLAG ... --resume` on every host of a TPU VM or pod slice (`--worker=all`), and again
where hosts lost one another or were restarted. The TPU stays, and is paid for, until you delete it.

PROJECT, ZONE     of Google Cloud
TPU               the name of the TPU
BUCKET            of Cloud Storage; the folder /runs on every host, for --data and --out
LIBTPU_INIT_ARGS  XLA flags for the TPU; see tpu/README.md             []
MAX_RESTARTS      after which it gives up                              [100]
PAUSE             seconds before a restart; longer than the 30 s
                  after which a silent host counts as dead             [40]
TEXT
  exit 0
fi

need PROJECT ZONE TPU BUCKET
prepare || fail "the hosts of $TPU could not be prepared; what failed is above"
for ((restart = 0; restart <= ${MAX_RESTARTS:-100}; restart++)); do
  run_job "$@"
  [[ $verdict == again ]] || exit "$status"
  echo "ended with status $status; restart $((restart + 1)) of at most ${MAX_RESTARTS:-100}" >&2
  sleep "${PAUSE:-40}"
done
echo "error: given up after ${MAX_RESTARTS:-100} restarts" >&2
exit "$status"
