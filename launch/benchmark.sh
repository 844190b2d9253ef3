#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
Install what is needed (PyTorch-Ignite and torchmetrics to compare with), then run benchmarks.

  bash launch/benchmark.sh [name ...] [arguments of the benchmarks, from the first one that starts with -]

A name is a file of benchmarks/, such as loop, loop.py or benchmarks/loop.py; default: loop.
PYTHON and DENGINE_VENV: as in launch/quickstart.sh --help.
TEXT
}

case "${1:-}" in -h | --help) usage; exit ;; esac

files=()
while (($# > 0)) && [[ "$1" != -* ]]; do
    files+=("$ROOT/benchmarks/$(basename -- "$1" .py).py")
    shift
done
((${#files[@]} > 0)) || files=("$ROOT/benchmarks/loop.py")

# All names first: a typo must not show only after the first benchmark has run for minutes.
for file in "${files[@]}"; do
    [[ -f "$file" ]] || fail "no benchmark ${file#"$ROOT/"}: benchmarks/ has $(cd -- "$ROOT/benchmarks" && echo *.py)"
done

set_up bench,metrics

for file in "${files[@]}"; do
    say "running ${file#"$ROOT/"} $*"
    "$VENV_PYTHON" "$file" "$@"
done
