#!/usr/bin/env bash
# Set-up, the linter, all tests with their coverage.
#
#   bash scripts/test.sh                                 # everything, by two processes; fails under 80 % coverage
#   bash scripts/test.sh tests/test_golden.py -k flops   # arguments go to pytest; then no coverage is demanded
#
# GOLDEN_DIR: recorded vectors for the parity tests (default: ../shared/golden beside the repository).
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
GOLDEN_DIR="$(realpath -m "${GOLDEN_DIR:-$ROOT/../shared/golden}")"
export GOLDEN_DIR
PYTHON="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)"
cd "$ROOT"

for module in pytest pytest_cov xdist ruff; do
  "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" || {
    echo "test: $PYTHON has no $module; install requirements.txt there, or unset PYTHON" >&2
    exit 1
  }
done

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .

coverage=(--cov-report=term-missing:skip-covered)
for module in *.py drawing evaluation exporting loading models ops tasks utils; do
  coverage+=(--cov="${module%.py}")
done
if [[ $# -eq 0 ]]; then
  coverage+=(--cov-fail-under=80)
  # The tests' tensors are tiny: two processes of one thread are faster than one of two. What depends on the number of
  # threads sets it.
  export OMP_NUM_THREADS=1
  set -- -n 2 --dist worksteal --durations 15
fi
exec "$PYTHON" -m pytest "${coverage[@]}" "$@"
