#!/usr/bin/env bash
# All that needs a GPU, in one call of at most 10 minutes: the GPU tests, then every GPU benchmark. A part that fails
# or outruns its time is reported, the others still run; a table closes it, and the exit code is 1 if any part failed.
#
#   bash scripts/gpu_check.sh OUT_DIR
#   PYTHON=python3 TEST_SECONDS=120 bash scripts/gpu_check.sh OUT_DIR
#
# OUT_DIR gets log.txt, summary.txt and one JSON file for each benchmark.
# TEST_SECONDS and BENCHMARK_SECONDS: the time of the tests and of each benchmark.
set -uo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TEST_SECONDS="${TEST_SECONDS:-240}"
BENCHMARK_SECONDS="${BENCHMARK_SECONDS:-100}"

if [[ $# -ne 1 ]]; then
  echo "gpu_check: name one folder for the results: bash scripts/gpu_check.sh OUT_DIR" >&2
  exit 2
fi
mkdir -p "$1" 2>/dev/null && out="$(cd "$1" && pwd)" && [[ -w $out ]] || {
  echo "gpu_check: cannot write to $1" >&2
  exit 1
}
PYTHON="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)" || exit 1
"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
  echo "gpu_check: PyTorch sees no CUDA device here" >&2
  exit 1
}

log="$out/log.txt"
summary="$out/summary.txt"
row='%-18s %-18s %7s  %s\n'
any_failed=0
export PYTHONUNBUFFERED=1
cd "$ROOT" || exit 1

# part NAME SECONDS COMMAND...
part() {
  local name="$1" limit="$2" start=$SECONDS offset status outcome last
  shift 2
  printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "$*" | tee -a "$log"
  offset="$(wc -c <"$log")"
  timeout --kill-after=10 "$limit" "$@" 2>&1 </dev/null | tee -a "$log"
  status=${PIPESTATUS[0]}
  last="$(tail -c "+$((offset + 1))" "$log" | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c 1-100)"
  case $status in
    0) outcome=passed ;;
    124 | 137) outcome="out of time" ;;
    *) outcome="failed (exit $status)" ;;
  esac
  [[ $status -eq 0 ]] || any_failed=1
  # shellcheck disable=SC2059
  printf "$row" "$name" "$outcome" "$((SECONDS - start))" "$last" >>"$summary"
}

: >"$log"
# shellcheck disable=SC2059
printf "$row" part outcome seconds "last line" >"$summary"

part tests "$TEST_SECONDS" "$PYTHON" -m pytest -m gpu -q --tb=short
for benchmark in ops model train; do
  part "benchmark $benchmark" "$BENCHMARK_SECONDS" \
    "$PYTHON" "benchmarks/$benchmark.py" --device cuda --output "$out/$benchmark.json"
done

echo
cat "$summary"
exit "$any_failed"
