#!/usr/bin/env bash
# Starts the image on every host of a hostfile over ssh, as node 0, 1, ... of one job, and waits:
#
#   bash docker/over_ssh.sh HOSTFILE IMAGE [ARG...]      # ARGs as after `docker run IMAGE`
#
# HOSTFILE has a line "host slots=N" for each host, as DeepSpeed's; slots is the number of processes
# there and may be left out. ssh must get there without a password, and IMAGE must be there; nothing
# inside the containers needs ssh. MASTER_ADDR (default: the first host) and MASTER_PORT (29400) say
# where node 0 is found; DOCKER_OPTIONS are further options of `docker run` on every host, such as
# "--gpus all --shm-size 8g -v /data/runs:/workspace/runs".
#
# Ctrl-C and SIGTERM stop all containers, with time for a checkpoint. The exit code is the first one
# that is not 0.
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "usage: bash docker/over_ssh.sh HOSTFILE IMAGE [ARG...]" >&2
    exit 2
fi
hostfile=$1 image=$2
shift 2
hosts=() slots=()
while read -r host options; do
    [[ -z $host || $host == \#* ]] && continue
    slot=
    if [[ $options =~ (^|[[:space:]])slots=([0-9]+) ]]; then slot=${BASH_REMATCH[2]}; fi
    hosts+=("$host") slots+=("$slot")
done <"$hostfile"
if [[ ${#hosts[@]} -eq 0 ]]; then
    echo "over_ssh: no host in $hostfile; a line is: host slots=N" >&2
    exit 2
fi
master=${MASTER_ADDR:-${hosts[0]##*@}} port=${MASTER_PORT:-29400}
name=arg-dist-$port-$$

on_host() { ssh -o BatchMode=yes "$@"; }

# shellcheck disable=SC2329  # called by the trap
stop_all() {
    for node in "${!hosts[@]}"; do
        on_host "${hosts[node]}" "docker stop -t 120 $name-$node" >/dev/null 2>&1 &
    done
}
trap stop_all INT TERM

children=()
for node in "${!hosts[@]}"; do
    command=(docker run --rm --network host --name "$name-$node"
        -e "NNODES=${#hosts[@]}" -e "NODE_RANK=$node"
        -e "MASTER_ADDR=$master" -e "MASTER_PORT=$port")
    [[ -n ${slots[node]} ]] && command+=(-e "NPROC_PER_NODE=${slots[node]}")
    # DOCKER_OPTIONS is several words, which the shell of the host takes apart
    line="${command[*]@Q} ${DOCKER_OPTIONS:-} ${image@Q}"
    [[ $# -gt 0 ]] && line+=" ${*@Q}"
    echo "over_ssh: ${hosts[node]}: $line"
    on_host "${hosts[node]}" "$line" < /dev/null 2>&1 | sed -u "s|^|${hosts[node]}: |" &
    children+=($!)
done

code=0
for child in "${children[@]}"; do
    # a signal ends `wait`, not the child
    while :; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    [[ $code -eq 0 ]] && code=$status
done
exit "$code"
