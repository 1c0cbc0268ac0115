#!/usr/bin/env bash
# Runs this machine's part of a job on several machines, without ssh: the same command on each,
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launchers/multinode/node.sh torchrun \
#       launchers/train_lm.py --deepspeed_config ds_configs/zero2.json --model 130m
#
# with NODE_RANK=1 on the second one. The first argument is the launcher: torchrun, deepspeed (with
# its --no_ssh), or accelerate, which reads ACCELERATE_CONFIG. The variables are listed by
# python -m launchers.cluster --help; the command that is run is printed first.
set -euo pipefail

case ${1-} in
torchrun | deepspeed | accelerate) ;;
*)
    echo "node.sh: the first argument must be torchrun, deepspeed or accelerate, got '${1-}'" >&2
    exit 2
    ;;
esac
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
if [[ -d .venv ]]; then
    export PATH=$root/.venv/bin:$PATH
fi
exec python -m launchers.cluster --launcher "$@"
