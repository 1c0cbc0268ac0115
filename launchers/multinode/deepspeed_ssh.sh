#!/usr/bin/env bash
# Runs a job on all hosts of a hostfile; DeepSpeed itself starts it over ssh from one of them:
#
#   launchers/multinode/deepspeed_ssh.sh hostfile \
#       launchers/train_lm.py --deepspeed_config ds_configs/zero3_bf16.json --model 1b
#
# The hostfile has one line per host, "worker-1 slots=8": a name that ssh reaches without a
# password, and its number of GPUs. The first host is node 0. Package, script and data have the same
# paths on all hosts. Requires pdsh on this host, or another DEEPSPEED_LAUNCHER. MASTER_PORT (29500)
# of the first host must be open to the others. Without ssh: launchers/multinode/node.sh.
set -euo pipefail

if (($# < 2)); then
    echo "deepspeed_ssh.sh: a hostfile and a script are needed, got '$*'" >&2
    exit 2
fi
hostfile=$1
shift
if [[ ! -r $hostfile ]]; then
    echo "deepspeed_ssh.sh: hostfile $hostfile: cannot be read" >&2
    exit 2
fi
hostfile=$(cd -- "$(dirname -- "$hostfile")" && pwd)/$(basename -- "$hostfile")
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
if [[ -d .venv ]]; then
    export PATH=$root/.venv/bin:$PATH
fi

command=(deepspeed --hostfile "$hostfile" --launcher "${DEEPSPEED_LAUNCHER:-pdsh}"
    --master_port "${MASTER_PORT:-29500}")
if [[ -n ${MASTER_ADDR:-} ]]; then # otherwise DeepSpeed asks the first host for its address
    command+=(--master_addr "$MASTER_ADDR")
fi
command+=("$@")
grep -vE '^[[:space:]]*(#|$)' "$hostfile" | sed 's/^/deepspeed_ssh.sh: host /'
printf 'deepspeed_ssh.sh:'
printf ' %q' "${command[@]}"
echo
exec "${command[@]}"
