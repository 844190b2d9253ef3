# shellcheck shell=bash
# Sourced by the scripts beside it and by .ci/run: one virtual environment with the package in it.
#
#   set_up test,lint    afterwards $VENV_PYTHON runs, with those extras of pyproject.toml installed
#
# Environment: PYTHON (the Python to make it with), DENGINE_VENV (its folder; default: .venv of this repository).
set -euo pipefail

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${DENGINE_VENV:-$ROOT/.venv}"
# Absolute, because a script may change folder after this.
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
VENV_PYTHON="$VENV/bin/python"
IS_NEW_ENOUGH='import sys; sys.exit(sys.version_info < (3, 10))'

# Progress goes to stderr, so that the output of a benchmark can be piped.
say() { printf 'dengine: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

set_up() {
    local extras=$1 wanted extra stamps="$VENV/.dengine" missing=""
    make_venv
    wanted="$(fingerprint)"
    for extra in ${extras//,/ }; do
        [[ "$(cat "$stamps/$extra" 2>/dev/null)" == "$wanted" ]] || missing="$missing $extra"
    done
    if [[ -z "$missing" ]]; then
        say "$VENV is up to date ($extras)"
        return
    fi
    say "installing dengine[$extras] into $VENV (the first time this fetches PyTorch and takes minutes)"
    mkdir -p "$stamps"
    pip_install "$extras" "$stamps/pip.log"
    # One stamp per extra, and only now: an install that was cut short is done again.
    for extra in ${extras//,/ }; do
        printf '%s\n' "$wanted" >"$stamps/$extra"
    done
}

make_venv() {
    local python
    if "$VENV_PYTHON" -c '' 2>/dev/null; then
        "$VENV_PYTHON" -c "$IS_NEW_ENOUGH" ||
            fail "$VENV holds a Python older than 3.10: remove that folder, or set DENGINE_VENV to another one"
        return
    fi
    # DENGINE_VENV could name any folder, and --clear below empties it.
    if [[ -e "$VENV" && ! -f "$VENV/pyvenv.cfg" && -n "$(ls -A "$VENV")" ]]; then
        fail "$VENV is there but is no virtual environment: remove it, or set DENGINE_VENV to another folder"
    fi
    python="$(find_python)" || exit 1
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module or no pip for it: install them (Debian, Ubuntu: apt install python3-venv)"
    say "creating $VENV with $("$python" --version 2>&1)"
    "$python" -m venv --clear "$VENV"
}

find_python() {
    local name
    local -a names=(python3 python3.14 python3.13 python3.12 python3.11 python3.10)
    [[ -z "${PYTHON:-}" ]] || names=("$PYTHON")
    for name in "${names[@]}"; do
        # Run it, do not just look for it: version managers leave names on PATH that only print an error.
        if "$name" -c "$IS_NEW_ENOUGH" 2>/dev/null; then
            printf '%s\n' "$name"
            return
        fi
    done
    [[ -z "${PYTHON:-}" ]] || fail "PYTHON=$PYTHON is no Python 3.10 or newer: unset it, or set it to one"
    fail "no Python 3.10 or newer found: install one (Debian, Ubuntu: apt install python3 python3-venv)" \
        "or set PYTHON to the one to use"
}

# The folder counts too: a copied or moved environment still imports the package from the old place.
# cksum, because unlike sha256sum it is on every system.
fingerprint() {
    { printf '%s\n' "$ROOT" "$VENV" && cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt"; } | cksum
}

count_gpus() { "$VENV_PYTHON" -c 'import torch; print(torch.cuda.device_count())'; }

pip_install() {
    local extras=$1 log=$2
    # Other tools' environments come without pip, and so does one whose creation was interrupted.
    "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || "$VENV_PYTHON" -m ensurepip >/dev/null 2>&1 ||
        fail "no pip in $VENV: install it (Debian, Ubuntu: apt install python3-venv), remove $VENV and run this again"
    # Not --quiet: that hides which packages are in conflict. The log keeps everything out of sight.
    if ! (cd -- "$ROOT" && "$VENV_PYTHON" -m pip install --no-input --disable-pip-version-check \
        --constraint constraints.txt --editable ".[$extras]") >"$log" 2>&1; then
        # If pip searches local folders, it warns about each package that is not in them.
        local noise="WARNING: Location .* is ignored|Requirement already|Looking in|Obtaining|Collecting|Using"
        noise="$noise|Downloading|[^:]*: (started|finished with status 'done')"
        grep -vE "^ *($noise)" "$log" | tail -n 25 >&2 || true
        fail "pip could not install dengine[$extras]; its errors are above, all it said is in $log"
    fi
}
