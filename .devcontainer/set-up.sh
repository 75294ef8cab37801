#!/usr/bin/env bash
# In a container of this folder's image: its environment becomes .venv, as after `make setup`. Downloads nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e .venv ] && [ ! -L .venv ]; then
    echo "The folder .venv was made outside this container: delete it, and run $0 again." >&2
    exit 1
fi
ln -sfn /opt/course/.venv .venv
.venv/bin/pip install --quiet --no-index --no-deps --no-build-isolation -e .
touch .venv/.ready
.venv/bin/workshop doctor
