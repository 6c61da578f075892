#!/usr/bin/env bash
# All that needs a GPU, in one call of less than 10 minutes: the GPU tests, every GPU benchmark, and what they say of the
# goals. A part that fails or outruns its time is reported, the others still run; a table closes it, and the exit code
# is 1 if any part failed. A goal that is missed is told, and is no failure.
#
#   bash scripts/gpu_check.sh OUT_DIR
#   PYTHON=python3 TOTAL_SECONDS=1200 bash scripts/gpu_check.sh OUT_DIR
#
# OUT_DIR gets log.txt, summary.txt, goals.json and the records of the benchmarks: ops.json, model-s.json,
# model-s-512.json, model-tb.json, train.json. Records of an earlier call are removed first.
# TOTAL_SECONDS (550): each part has its share of it, and what the parts before it left over.
set -uo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TOTAL_SECONDS="${TOTAL_SECONDS:-550}"

if [[ $# -ne 1 ]]; then
  echo "gpu_check: name one folder for the results: bash scripts/gpu_check.sh OUT_DIR" >&2
  exit 2
fi
if [[ ! $TOTAL_SECONDS =~ ^[1-9][0-9]*$ ]]; then
  echo "gpu_check: TOTAL_SECONDS=$TOTAL_SECONDS is not a positive whole number" >&2
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
shares=0
begin=$SECONDS
export PYTHONUNBUFFERED=1
cd "$ROOT" || exit 1
rm -f "$out"/{goals,ops,model-s,model-s-512,model-tb,train}.json

# part NAME SHARE COMMAND...; SHARE in hundredths of TOTAL_SECONDS
part() {
  local name="$1" start=$SECONDS limit offset status outcome last
  shares=$((shares + $2))
  limit=$((begin + TOTAL_SECONDS * shares / 100 - start))
  [[ $limit -ge 5 ]] || limit=5 # what comes last has a chance whatever happened before
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

part tests 35 "$PYTHON" -m pytest -m gpu -q --tb=short
part "benchmark ops" 9 "$PYTHON" benchmarks/ops.py --device cuda --precision bf16 --batch 256 --rounds 10 \
  --output "$out/ops.json"
part "model S" 20 "$PYTHON" benchmarks/model.py --device cuda --models S --batch 256 1 16 64 --seconds 2 --profile \
  --output "$out/model-s.json"
part "model S, 512" 11 "$PYTHON" benchmarks/model.py --device cuda --models S --img-size 512 --batch 256 --seconds 2 \
  --output "$out/model-s-512.json"
part train 17 "$PYTHON" benchmarks/train.py --device cuda --batch 256 --seconds 4 --profile --output "$out/train.json"
# without torch.compile, which takes half a minute for each shape
part "model T and B" 6 "$PYTHON" benchmarks/model.py --device cuda --models T B --batch 256 1 16 64 --seconds 0.5 \
  --no-compile --output "$out/model-tb.json"
part goals 2 "$PYTHON" benchmarks/goals.py "$out" --output "$out/goals.json"

echo
cat "$summary"
exit "$any_failed"
