#!/usr/bin/env bash
# Runs a job until it is done, where no scheduler does: see --help.
set -uo pipefail

if [[ ${1:---help} == --help ]]; then
  cat <<'TEXT'
usage: [SETTING=VALUE ...] gpu/run_until_done.sh JOB [FLAG ...]

Starts `trainjax JOB FLAG ... --resume` in one or several processes on this machine, and starts all of them
again when one was killed by a signal, lost another process of the run (75) or was told to stop (143).
It ends with 0 when the job is done, and with the job's status where starting it again would not help
(1: the job could not be done, 2: the command is not right, 130: interrupted). SIGTERM or Ctrl-C to this
script stops the job after a checkpoint, and the script.

PROCESSES     on this machine; with more than one, each has one GPU             [1]
HOSTS         machines of the run; start this script on each of them            [1]
HOST          which of them this is, from 0                                     [0]
COORDINATOR   host:port on host 0, as all hosts reach it; needed for HOSTS > 1
MAX_RESTARTS  restarts after which it gives up                                  [100]
PATIENCE      seconds that the other processes have to end after the first      [90]
PAUSE         seconds before a restart; on several hosts longer than the 30 s
              after which a silent process counts as dead                       [0; 40 if HOSTS > 1]
TEXT
  exit 0
fi

fail() { echo "error: $1" >&2; exit 2; }

processes=${PROCESSES:-1} hosts=${HOSTS:-1} host=${HOST:-0} restarts=${MAX_RESTARTS:-100}
patience=${PATIENCE:-90}
for setting in "PROCESSES=$processes" "HOSTS=$hosts" "HOST=$host" "MAX_RESTARTS=$restarts" \
  "PATIENCE=$patience"; do
  [[ $setting =~ =[0-9]+$ ]] || fail "$setting is not a whole number"
done
((processes > 0)) || fail "PROCESSES=$processes: a run has at least one"
((host < hosts)) || fail "HOST=$host is not one of HOSTS=$hosts, from 0"
((hosts == 1)) || [[ -n ${COORDINATOR:-} ]] || fail "HOSTS=$hosts needs COORDINATOR=host:port of host 0"
pause=${PAUSE:-$((hosts > 1 ? 40 : 0))}
command -v trainjax >/dev/null || fail "there is no trainjax on PATH; activate its environment first"

alive=() stopped=0
# shellcheck disable=SC2317,SC2329  # trap calls it
stop() {
  stopped=$1
  kill -TERM "${alive[@]}" 2>/dev/null
}
trap 'stop 143' TERM HUP
trap 'stop 130' INT

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# Starts the processes; their ids are in `alive`.
start() {
  local total=$((processes * hosts)) address=${COORDINATOR:-localhost:$(free_port)}
  local gpus number place
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
  for ((number = 0; number < processes; number++)); do
    place=()
    if ((total > 1)); then
      place=(--coordinator "$address" --num-processes "$total"
        --process-id $((host * processes + number)))
    fi
    if ((processes > 1)); then
      CUDA_VISIBLE_DEVICES=${gpus[number]:-$number} trainjax "${place[@]}" "$@" --resume &
    else
      trainjax "${place[@]}" "$@" --resume &
    fi
    alive+=($!)
  done
}

# Waits for all of them. `verdict` is the status of the first that failed, which is the cause: the others
# only lost it.
finish() {
  local left pid status deadline=
  verdict=0 statuses=()
  while ((${#alive[@]})); do
    left=()
    for pid in "${alive[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        left+=("$pid")
        continue
      fi
      wait "$pid"
      status=$?
      statuses+=("$status")
      if ((status > 0 && verdict == 0)); then
        verdict=$status deadline=$((SECONDS + patience))
      fi
    done
    alive=("${left[@]}")
    if [[ -n $deadline ]] && ((SECONDS > deadline && ${#alive[@]})); then
      kill -KILL "${alive[@]}"
    fi
    sleep 0.1
  done
}

for ((restart = 0; restart <= restarts; restart++)); do
  start "$@"
  finish
  ((verdict > 0)) || exit 0
  ((stopped == 0)) || exit "$stopped"
  ((verdict == 75 || (verdict > 128 && verdict != 130))) || exit "$verdict"
  echo "ended with status ${statuses[*]}; restart $((restart + 1)) of at most $restarts" >&2
  sleep "$pause"
  ((stopped == 0)) || exit "$stopped"
done
echo "error: given up after $restarts restarts, the last because of status $verdict" >&2
exit "$verdict"
