#!/usr/bin/env bash
# Collects wheels of everything that the images install, at the versions of constraints.txt: for
# builds without network, or with a package index that the image cannot reach.
#
#   bash docker/make_wheelhouse.sh                    # into docker/wheelhouse, which builds use
#   PYTHON=python3.12 bash docker/make_wheelhouse.sh DIR
#
# PYTHON must have the image's minor version (default: python3.11, or else python3). pip's own
# variables select the package index; for the CPU image set PIP_EXTRA_INDEX_URL to
# https://download.pytorch.org/whl/cpu. Wheels that exist are not downloaded again.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# -gt 1 || ${1:-} == -* ]]; then
    echo "usage: bash docker/make_wheelhouse.sh [DIR]" >&2
    exit 2
fi
wheelhouse=${1:-$root/docker/wheelhouse}
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [[ -z $python ]]; then
    echo "make_wheelhouse: no python3 found; select one with PYTHON=/path/to/python" >&2
    exit 2
fi
mkdir -p "$wheelhouse"

# Only the requirements: the package itself is built in the image, from the context. A wheel of
# DeepSpeed without operators runs on every machine.
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$python" "$root/docker/requirements.py" "$root/pyproject.toml" >"$requirements"
DS_BUILD_OPS=0 "$python" -m pip wheel --disable-pip-version-check --progress-bar off \
    --wheel-dir "$wheelhouse" --find-links "$wheelhouse" \
    --constraint "$root/constraints.txt" --requirement "$requirements"
echo "make_wheelhouse: $(find "$wheelhouse" -name '*.whl' | wc -l) wheels in $wheelhouse"
