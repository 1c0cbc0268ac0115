#!/usr/bin/env bash
# Installs the optimizers that benchmarks.compare runs next to AdaRankGrad, at the versions pinned in
# constraints.txt, without their dependencies: some require bitsandbytes, which is not used here.
#   bash benchmarks/setup_compare.sh           into .venv
#   bash benchmarks/setup_compare.sh PYTHON    into that interpreter's environment
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${1:-$root/.venv/bin/python}
if [[ ! -x $(command -v "$python") ]]; then
    echo "setup_compare: no python at $python; run launchers/setup_env.sh, or pass one" >&2
    exit 2
fi
"$python" -m pip --quiet --quiet --disable-pip-version-check install --no-deps \
    --constraint "$root/constraints.txt" galore-torch apollo-torch fira peft pytorch_optimizer
