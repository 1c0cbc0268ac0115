#!/usr/bin/env bash
# This machine's part of a job on several machines, without ssh: the same command on each of them,
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launchers/multinode/node.sh torchrun \
#       launchers/train_lm.py --deepspeed_config ds_configs/zero2.json --model 130m
#
# and with NODE_RANK=1 on the second one. The first word is the launcher: torchrun, deepspeed (by
# its --no_ssh), or accelerate, which reads ACCELERATE_CONFIG. All variables are those of
# python -m launchers.cluster --help, which prints what it is about to run.
set -euo pipefail

case ${1-} in
torchrun | deepspeed | accelerate) ;;
*)
    echo "node.sh: torchrun, deepspeed or accelerate is needed first, got '${1-}'" >&2
    exit 2
    ;;
esac
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
if [[ -d .venv ]]; then
    export PATH=$root/.venv/bin:$PATH
fi
exec python -m launchers.cluster --launcher "$@"
