#!/usr/bin/env bash
# The steps that both Dockerfiles share; each is one RUN inside the image.
#
#   install.sh dependencies FILES   Python, tini, the user, and in /opt/venv the requirements of
#                                   FILES (pyproject.toml, constraints.txt, requirements.py,
#                                   wheelhouse/)
#   install.sh package CONTEXT      arg_dist itself
#
# With wheels in FILES/wheelhouse no package index is used; otherwise TORCH_INDEX is the index for
# torch (empty: pip's own). apt installs only what the base image lacks.
set -euo pipefail

venv=/opt/venv
user=trainer
user_id=10001

fetch_system_packages() {
    local missing=()
    command -v python3 >/dev/null || missing+=(python3)
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
    command -v tini >/dev/null || missing+=(tini)
    if [[ ${#missing[@]} -gt 0 ]]; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update
        apt-get install --yes --no-install-recommends ca-certificates "${missing[@]}"
        rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log
    fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "install: the base image has $(python3 --version); 3.11 or newer is needed" >&2
        exit 2
    fi
}

make_user() {
    groupadd --gid "$user_id" "$user"
    useradd --uid "$user_id" --gid "$user_id" --create-home --shell /bin/bash "$user"
    mkdir -p /workspace/runs
    chown "$user:$user" /workspace/runs
}

pip_install() {
    "$venv/bin/python" -m pip install --no-cache-dir --disable-pip-version-check --quiet \
        --root-user-action ignore --progress-bar off "$@"
}

install_dependencies() {
    local files=$1 wheelhouse=$1/wheelhouse requirements source=()
    requirements=$(mktemp)
    python3 "$files/requirements.py" "$files/pyproject.toml" >"$requirements"
    python3 -m venv "$venv"
    if compgen -G "$wheelhouse/*.whl" >/dev/null; then
        source=(--no-index --find-links "$wheelhouse")
    elif [[ -n ${TORCH_INDEX:-} ]]; then
        source=(--extra-index-url "$TORCH_INDEX")
    fi
    # DeepSpeed's build imports the installed torch, so torch comes first. No operator is compiled:
    # training needs none.
    pip_install "${source[@]}" --constraint "$files/constraints.txt" torch numpy setuptools
    DS_BUILD_OPS=0 pip_install "${source[@]}" --constraint "$files/constraints.txt" \
        --requirement "$requirements"
    rm -f "$requirements"
}

install_package() {
    local sources
    sources=$(mktemp -d) # the build writes next to its sources, and the context is read-only
    cp -r "$1/arg_dist" "$1/pyproject.toml" "$1/README.md" "$1/LICENSE" "$sources"
    pip_install --no-index --no-deps --no-build-isolation "$sources"
    rm -rf "$sources"
    "$venv/bin/python" -m pip --disable-pip-version-check check
}

case "${1:-} $#" in
    "dependencies 2")
        fetch_system_packages
        make_user
        install_dependencies "$2"
        ;;
    "package 2")
        install_package "$2"
        ;;
    *)
        echo "usage: install.sh dependencies FILES | install.sh package CONTEXT" >&2
        exit 2
        ;;
esac
