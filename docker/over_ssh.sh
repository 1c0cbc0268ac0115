#!/usr/bin/env bash
# Starts the image on every host of a hostfile over ssh, as node 0, 1, ... of one job, and waits:
#
#   bash docker/over_ssh.sh HOSTFILE IMAGE [ARG...]      # ARGs as after `docker run IMAGE`
#
# HOSTFILE has a line "host slots=N" for each host, as for DeepSpeed; slots is the host's number of
# processes and optional. Each host must accept ssh without a password and have IMAGE; the
# containers themselves need no ssh. MASTER_ADDR (default: the first host) and MASTER_PORT (29400)
# are the address of node 0; DOCKER_OPTIONS are further options of `docker run` on every host, for
# example "--gpus all --shm-size 8g -v /data/runs:/workspace/runs".
#
# Ctrl-C and SIGTERM stop all containers, with time for a checkpoint. The exit code is the first
# nonzero one.
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
    echo "over_ssh: no host in $hostfile; expected lines of the form: host slots=N" >&2
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
    # DOCKER_OPTIONS is left unquoted, so the host's shell splits it into arguments
    line="${command[*]@Q} ${DOCKER_OPTIONS:-} ${image@Q}"
    [[ $# -gt 0 ]] && line+=" ${*@Q}"
    echo "over_ssh: ${hosts[node]}: $line"
    on_host "${hosts[node]}" "$line" < /dev/null 2>&1 | sed -u "s|^|${hosts[node]}: |" &
    children+=($!)
done

code=0
for child in "${children[@]}"; do
    # a signal interrupts `wait`, not the child
    while :; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    [[ $code -eq 0 ]] && code=$status
done
exit "$code"
