#!/usr/bin/env bash
# usage: PYTHON=python3 local/venv.sh REQUIREMENTS   makes .venv and installs REQUIREMENTS into it, hashes checked
set -Eeuo pipefail

# usage: die MESSAGE...   one sentence that says what to do
die() {
    printf 'ERROR: %s\n' "$*" >&2
    exit 1
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "Python 3.11 or newer is needed; set PYTHON to one, e.g. make demo PYTHON=python3.12."
log_file=$(mktemp)
trap 'rm -f -- "$log_file"' EXIT
if [[ ! -x .venv/bin/pip ]]; then
    echo "Making .venv ..." >&2
    "$PYTHON" -m venv --clear .venv >"$log_file" 2>&1 ||
        die "$PYTHON cannot make a virtual environment (Debian and Ubuntu: apt install python3-venv)."
fi
echo "Installing $1 (once) ..." >&2
# --no-compile: a third of the time; Python compiles what is imported when it is imported.
# --no-deps: the lists are complete, and pip would look for the newest of what a package asks for with an extra.
.venv/bin/pip install --quiet --no-deps --no-compile --disable-pip-version-check --require-hashes -r "$1" \
    >"$log_file" 2>&1 ||
    die "pip could not install $1; is there a network? Its last line: $(grep -v '^WARNING' "$log_file" | tail -n 1)"
