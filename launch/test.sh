#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
Install what is needed, then run the tests.

  bash launch/test.sh [arguments of pytest]        tests/ in parallel, then tests_dist/ one by one; then, where there
                                                   is a GPU, the tests on GPUs, which all others do not see
  bash launch/test.sh tests/engine [arguments]     one pytest over the paths named

PYTHON and DENGINE_VENV: as in launch/quickstart.sh --help.
DENGINE_COVERAGE: a file into which the lines that tests/ has run are written, for `coverage report --data-file=...`.
TEXT
}

case "${1:-}" in -h | --help) usage; exit ;; esac

set_up "test${DENGINE_COVERAGE:+,coverage}"
cd -- "$ROOT"
# Several processes share the cores, in tests_dist/ as under xdist.
export OMP_NUM_THREADS=1

for argument in "$@"; do
    case "${argument#"$ROOT/"}" in
        tests | tests/* | tests_dist | tests_dist/*) exec "$VENV_PYTHON" -m pytest "$@" ;;
    esac
done

logs="$(mktemp -d)"
trap 'rm -rf -- "$logs"' EXIT
# pytest turns Ctrl-C into an exit code of its own; without this the second half would still start.
trap 'exit 130' INT

# Through a pipe pytest sees no terminal.
color=no
[[ ! -t 1 ]] || color=yes

# run_pytest NAME ARGUMENT...: its exit code is pytest's, as pipefail carries it past tee.
run_pytest() {
    local name=$1
    shift
    "$VENV_PYTHON" -m pytest "--color=$color" "$@" | tee "$logs/$name"
}

closing_line() {
    grep -E ' in [0-9]+\.[0-9]+s' "$logs/$1" | tail -n 1 || printf 'pytest gave no closing line\n'
}

measured=()
if [[ -n "${DENGINE_COVERAGE:-}" ]]; then
    export COVERAGE_FILE="$DENGINE_COVERAGE"
    measured=(--cov=dengine --cov-report=)
fi
tests_code=0
run_pytest tests tests -n logical --maxprocesses=4 --dist=loadfile ${measured[@]+"${measured[@]}"} "$@" || tests_code=$?
dist_code=0
run_pytest tests_dist tests_dist "$@" || dist_code=$?
gpu_code=0
gpu_line=""
num_gpus="$(count_gpus)"
if ((num_gpus > 0)); then
    run_pytest gpu -m gpu tests tests_dist "$@" || gpu_code=$?
    gpu_line="gpu:        $(closing_line gpu)"$'\n'
fi

printf '\n%stests:      %s\ntests_dist: %s\n' "$gpu_line" "$(closing_line tests)" "$(closing_line tests_dist)"

# 5: nothing selected. A selection such as -k may well fit one folder only, but not neither.
nothing=5
if (($# > 0)); then
    ((tests_code != nothing || dist_code != 0)) || tests_code=0
    ((dist_code != nothing || tests_code != 0)) || dist_code=0
    ((gpu_code != nothing)) || gpu_code=0
fi
((tests_code == 0 && dist_code == 0 && gpu_code == 0)) || exit 1
