#!/usr/bin/env bash
# For every Python from 3.11 on that is found: a fresh environment, `pip install .`, and the tutorial pasted into it.
#   tools/first_visit.sh [PYTHON...]
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pythons=("$@")
if [ $# = 0 ]; then
    for version in 3.11 3.12 3.13 3.14; do
        # The shim of pyenv is in the PATH also for versions that are not chosen there.
        for python in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python; do
            if "$python" -c '' 2>/dev/null; then pythons+=("$python"); break; fi
        done
    done
fi
[ "${#pythons[@]}" -gt 0 ] || { echo "No Python from 3.11 to 3.14 was found." >&2; exit 1; }
for python in "${pythons[@]}"; do
    "$python" -m venv --clear "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet .
    # From another folder, so that the installed package is imported and not the one here.
    page=$PWD/docs/tutorial.md paste=$PWD/tools/paste.py
    (cd "$work" && env -u PYTHONPATH venv/bin/python "$paste" "$page")
done
