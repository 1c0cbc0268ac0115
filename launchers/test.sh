#!/usr/bin/env bash
# Every check, then every test, the fast tiers first, two at a time. Arguments go to pytest:
#   bash launchers/test.sh             all of it
#   bash launchers/test.sh -x -k zero3
#   bash launchers/test.sh -n 0        one at a time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launchers/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if ! nvidia-smi --list-gpus >/dev/null 2>&1; then
  export DS_ACCELERATOR=cpu
fi

python -m ruff check .
python -m ruff format --check .
python -m mypy
shellcheck launchers/*.sh
exec python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder tests/unit tests/lockstep tests/pool tests/launch "$@"
