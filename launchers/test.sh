#!/usr/bin/env bash
# Runs all checks, then all tests, the fast tiers first. Arguments go to pytest:
#   bash launchers/test.sh             everything
#   bash launchers/test.sh -x -k zero3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launchers/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export ARG_DIST_TEST_PATIENCE=${ARG_DIST_TEST_PATIENCE:-3} # several tests share the cores
if ! nvidia-smi --list-gpus >/dev/null 2>&1; then
  export DS_ACCELERATOR=cpu
fi

python -m ruff check .
python -m ruff format --check .
python -m mypy
shopt -s globstar nullglob
shellcheck launchers/**/*.sh launchers/**/*.sbatch benchmarks/*.sh docker/**/*.sh
hadolint docker/Dockerfile docker/Dockerfile.cpu
python -m mkdocs --quiet build --strict --site-dir "$(mktemp -d)"

# tests/hosts spends most of its time waiting, so it runs in parallel; its report is printed last.
report=$(mktemp)
python -m pytest tests/hosts "$@" >"$report" 2>&1 &
hosts=$!
trap 'kill "$hosts" 2>/dev/null || true; rm -f "$report"' EXIT
none=5 # pytest's exit code if no test is selected
codes=()
python -m pytest tests/unit tests/lockstep -n 2 "$@" && codes+=(0) || codes+=($?)
# By file, so that a launch serves all its tests. More workers only slow each other's launches down,
# each of which has up to four processes, until their time limits are over.
workers=(-n 2 --dist loadfile --no-loadscope-reorder)
python -m pytest tests/pool tests/launch "${workers[@]}" "$@" && codes+=(0) || codes+=($?)
wait "$hosts" && codes+=(0) || codes+=($?)
cat "$report"
for code in "${codes[@]}"; do
  if ((code != 0 && code != none)); then exit "$code"; fi
done
if [[ ${codes[*]} == "$none $none $none" ]]; then exit "$none"; fi
