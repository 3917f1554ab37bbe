#!/usr/bin/env bash
# Makes .venv with the project and its tools, at the versions of constraints.txt.
# An argument is an extra to install, too; "compiler" adds only what the tests compile for GPUs
# with (1.3 GB).
set -euo pipefail
cd "$(dirname "$0")/.."

runs() { # Python >= 3.12 that can make an environment (a pyenv shim may exist and not run)
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' &>/dev/null &&
        { command -v uv >/dev/null || "$1" -c 'import ensurepip, venv' &>/dev/null; }
}

find_python() { # 3.12 first: the versions in constraints.txt were tested with it
    local name folder
    for name in python3.12 python3.13 python3.14 python3; do
        if runs "$name"; then command -v "$name" && return; fi
    done
    for name in 3.12 3.13 3.14; do
        for folder in "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$name"*; do
            if runs "$folder/bin/python"; then echo "$folder/bin/python" && return; fi
        done
    done
    # uv finds more, and downloads one where there is none.
    if command -v uv >/dev/null; then echo '>=3.12' && return; fi
    return 1
}

if ! runs .venv/bin/python; then
    if ! python=$(find_python); then
        echo "sparsex: no Python >= 3.12 with venv found: install one (python3.12 and" \
            "python3.12-venv, say), or uv, and run make again" >&2
        exit 2
    fi
    echo "Setting up .venv with $python"
    if command -v uv >/dev/null; then
        uv venv --quiet --clear --python "$python" .venv
    else
        "$python" -m venv --clear .venv
    fi
fi

uv=uv
if ! command -v uv >/dev/null; then
    uv=.venv/bin/uv
    [ -x "$uv" ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
fi
# Compiled once, since nothing may be written later (PYTHONDONTWRITEBYTECODE).
install() { "$uv" pip install --compile-bytecode --python .venv/bin/python --constraint constraints.txt "$@"; }

if [ "${1-}" = compiler ]; then
    # Beside the environment's packages: among them, JAX would look for a GPU at every start.
    # --no-deps: what they depend on is needed to run programs, not to compile them.
    requirements='import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["optional-dependencies"]["compile"], sep="\n")'
    requirements=$(.venv/bin/python -c "$requirements")
    install --target .venv/compiler --no-deps --requirements - <<<"$requirements"
else
    install --editable ".[dev,code${1:+,$1}]"
fi
