#!/usr/bin/env bash
# Creates .venv next to pyproject.toml and installs the package with its pinned dependencies.
# Returns at once if nothing has changed since the last call.
#
# PYTHON selects the interpreter (default: python3.11, or else python3). pip's own variables select
# the package index (PIP_INDEX_URL and so on), for instance for a CPU-only torch.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/.installed
wanted=$(cat "$root"/{constraints.txt,pyproject.toml,benchmarks/setup_compare.sh} | sha256sum)

if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

if [[ ! -x $venv/bin/python ]]; then
    python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
    if [[ -z $python ]]; then
        echo "setup_env: no python3.11 found; select one with PYTHON=/path/to/python" >&2
        exit 2
    fi
    "$python" -m venv "$venv"
fi

pip() {
    "$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check "$@" \
        --constraint "$root/constraints.txt"
}

echo "installing into .venv (once, takes some minutes)" >&2
# Builds use the installed torch and setuptools, so these come first: pip's isolated build
# environments have the newest setuptools. No DeepSpeed operator is compiled: training needs none.
pip install torch numpy setuptools
DS_BUILD_OPS=0 pip install --no-build-isolation --editable "${root}[train,dev]"
bash "$root/benchmarks/setup_compare.sh"
printf '%s\n' "$wanted" >"$stamp"
