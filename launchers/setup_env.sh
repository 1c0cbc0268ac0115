#!/usr/bin/env bash
# Makes .venv beside pyproject.toml and installs the package with its pinned dependencies.
# A second call sees that nothing has changed and returns at once.
#
# PYTHON names the interpreter (default: python3.11, or else python3). pip's own variables decide
# where packages come from (PIP_INDEX_URL and so on), for instance to get a torch for CPUs only.
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
        echo "setup_env: no python3.11 found; name one with PYTHON=/path/to/python" >&2
        exit 2
    fi
    "$python" -m venv "$venv"
fi

pip() {
    "$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check "$@" \
        --constraint "$root/constraints.txt"
}

echo "installing into .venv (once, some minutes)" >&2
# What is built looks at the torch and the setuptools that are installed, so these come first: an
# environment that pip makes for a build has the newest setuptools. No operator of DeepSpeed is
# compiled: training needs none of them.
pip install torch numpy setuptools
DS_BUILD_OPS=0 pip install --no-build-isolation --editable "${root}[train,dev]"
bash "$root/benchmarks/setup_compare.sh"
printf '%s\n' "$wanted" >"$stamp"
