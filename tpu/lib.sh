# shellcheck shell=bash
# What the scripts of this folder share; they read it with `source`.

fail() {
  echo "error: $1" >&2
  exit 2
}

# Says which settings are missing, all of them in one sentence.
need() {
  local name missing=()
  for name in "$@"; do
    [[ -n ${!name:-} ]] || missing+=("$name")
  done
  ((${#missing[@]} == 0)) || fail "${0##*/} needs ${missing[*]} in the environment; see --help"
  command -v gcloud >/dev/null || fail "there is no gcloud on PATH; install the Google Cloud CLI first"
}

vm() { gcloud compute tpus tpu-vm "$@" --project="$PROJECT" --zone="$ZONE"; }

# A command on every host of the TPU.
on_hosts() { vm ssh "$TPU" --worker=all --command="$1"; }

# Brings trainjax and the bucket to every host. Done again, it changes nothing.
prepare() {
  local archive
  archive=$(mktemp --suffix=.tar.gz) || return
  git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --format=tar.gz --output="$archive" HEAD &&
    vm scp "$archive" "$(dirname "${BASH_SOURCE[0]}")/host.sh" "$TPU:" --worker=all &&
    on_hosts "bash host.sh $(printf %q "${archive##*/}") $(printf %q "$BUCKET")"
  local status=$?
  rm -f "$archive"
  return "$status"
}

# Runs the job on every host until it ends there. Each host says how, since gcloud does not; `verdict` is
# `done`, `again` or `wrong`, and `status` what to exit with.
# shellcheck disable=SC2034  # the scripts read both
run_job() {
  local command ended log flags=""
  local is_wrong=0
  printf -v command '%q ' trainjax "$@" --resume
  [[ -z ${LIBTPU_INIT_ARGS:-} ]] || printf -v flags 'export LIBTPU_INIT_ARGS=%q; ' "$LIBTPU_INIT_ARGS"
  # shellcheck disable=SC2016  # the hosts expand it
  command="${flags}source ~/trainjax-env/bin/activate; $command;"
  # shellcheck disable=SC2016  # the hosts expand it
  command+=' status=$?; echo "host ended with status $status"; exit $status'
  log=$(mktemp)
  on_hosts "$command" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  # As trainjax exits: 1 or 2 for a job that is wrong, 130 for an interrupt. A host that only lost another
  # one has 75 or was aborted, and one that was preempted says nothing any more.
  while read -r ended; do
    case $ended in
      1 | 2 | 130) is_wrong=1 ;;
    esac
  done < <(grep -oE 'host ended with status [0-9]+' "$log" | grep -oE '[0-9]+$')
  rm -f "$log"
  if ((status == 0)); then
    verdict="done"
  elif ((is_wrong)); then
    verdict=wrong
  else
    verdict=again
  fi
}
