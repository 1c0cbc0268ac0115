#!/usr/bin/env bash
# Every check, then every test, the fast tiers first. Arguments go to pytest:
#   bash launchers/test.sh             all of it
#   bash launchers/test.sh -x -k zero3
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
shopt -s globstar nullglob
shellcheck launchers/**/*.sh launchers/**/*.sbatch docker/**/*.sh
hadolint docker/Dockerfile docker/Dockerfile.cpu
exec python -m pytest tests/unit tests/lockstep tests/pool tests/launch tests/hosts "$@"
