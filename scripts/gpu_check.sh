#!/usr/bin/env bash
# All that needs a GPU, in one call of about 8 minutes: the GPU tests, every GPU benchmark, and what they say of the
# goals, what matters most first. A part that fails or outruns its time is reported, the others still run; a table
# closes it, and the exit code is 1 if any part failed. A goal that is missed is told, and is no failure.
#
#   bash scripts/gpu_check.sh OUT_DIR
#   PYTHON=/path/to/python TOTAL_SECONDS=1200 bash scripts/gpu_check.sh OUT_DIR
#
# PYTHON: default a python3 on PATH whose PyTorch sees a CUDA device, else the environment of scripts/setup.sh. It needs
#   torch, triton, timm and pytest; with pytest-xdist the tests run, and compile their kernels, side by side.
# CUDA_VISIBLE_DEVICES: one GPU is used, the first of these.
# GOLDEN_DIR: the recorded cases of the public release; default shared/golden in the repository or beside it. Without them
#   parity is not checked, which the table says.
# TOTAL_SECONDS (480): each part has its share of it, and what the parts before it left over.
#
# OUT_DIR gets log.txt, summary.txt, goals.json and the records of the benchmarks, which are written as they grow:
# model-s.json, train.json, model-s-512.json, ops.json, model-tb.json. Records of an earlier call are removed first.
set -uo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TOTAL_SECONDS="${TOTAL_SECONDS:-480}"

fail() {
  echo "gpu_check: $1" >&2
  exit "${2:-1}"
}

sees_cuda() {
  "$1" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null
}

[[ ${1:-} != -h && ${1:-} != --help ]] || {
  sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
}
[[ $# -eq 1 && $1 != -* ]] || fail "name one folder for the results: bash scripts/gpu_check.sh OUT_DIR" 2
[[ $TOTAL_SECONDS =~ ^[1-9][0-9]*$ ]] || fail "TOTAL_SECONDS=$TOTAL_SECONDS is not a positive whole number" 2
mkdir -p -- "$1" 2>/dev/null && out="$(cd "$1" && pwd)" && [[ -w $out ]] || fail "cannot write to $1"
if [[ -n ${PYTHON:-} ]]; then
  python="$(command -v -- "$PYTHON")" || fail "PYTHON=$PYTHON is not a program"
elif sees_cuda python3; then
  python="$(command -v python3)"
else
  python="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)" || exit 1
fi
for module in torch triton timm pytest; do
  "$python" -c "import $module" 2>/dev/null || fail "$python cannot import $module; name another with PYTHON="
done
sees_cuda "$python" || fail "PyTorch sees no CUDA device here (asked: $python)"

if [[ -z ${GOLDEN_DIR:-} ]]; then
  GOLDEN_DIR="$ROOT/shared/golden"
  [[ -d $GOLDEN_DIR ]] || GOLDEN_DIR="$(realpath -m "$ROOT/../shared/golden")"
fi
GOLDEN_DIR="$(realpath -m "$GOLDEN_DIR")"
export GOLDEN_DIR PYTHONUNBUFFERED=1
tests=("$python" -m pytest -q --tb=short -rs)
cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" # which would count as cores
if "$python" -c 'import xdist' 2>/dev/null; then
  tests=(env OMP_NUM_THREADS=1 "${tests[@]}" -n "$((cores < 8 ? cores : 8))" --dist worksteal)
fi

log="$out/log.txt"
summary="$out/summary.txt"
row='%-18s %-18s %7s  %s\n'
any_failed=0
shares=0
begin=$SECONDS
cd "$ROOT" || exit 1
rm -f "$out"/{goals,ops,model-s,model-s-512,model-tb,train}.json
: >"$log"

report() {
  # shellcheck disable=SC2059
  printf "$row" "$@" >>"$summary"
}

# part NAME SHARE COMMAND...; SHARE in hundredths of TOTAL_SECONDS. The output goes to the log, its end to the screen;
# not through a pipe, which a process left behind by the command would keep open.
part() {
  local name="$1" start=$SECONDS limit offset status outcome last
  shares=$((shares + $2))
  limit=$((begin + TOTAL_SECONDS * shares / 100 - start))
  [[ $limit -ge 5 ]] || limit=5 # what comes last has a chance whatever happened before
  shift 2
  printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "$*" | tee -a "$log"
  offset="$(wc -c <"$log")"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1 </dev/null
  status=$?
  tail -c "+$((offset + 1))" "$log" | tail -n 30
  last="$(tail -c "+$((offset + 1))" "$log" | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c 1-100)"
  case $status in
    0) outcome=passed ;;
    124 | 137) outcome="out of time" ;;
    *) outcome="failed (exit $status)" ;;
  esac
  [[ $status -eq 0 && ! $last =~ ^[0-9]+\ skipped ]] || any_failed=1
  [[ $last =~ ^[0-9]+\ skipped ]] && outcome="all skipped"
  report "$name" "$outcome" "$((SECONDS - start))" "$last"
}

# A part that compares with the recorded cases.
parity() {
  if [[ -d $GOLDEN_DIR ]]; then
    part "$@"
    return
  fi
  local told="no recorded cases at $GOLDEN_DIR: PARITY WAS NOT CHECKED; set GOLDEN_DIR"
  printf '\n== %s: %s\n' "$1" "$told" | tee -a "$log"
  shares=$((shares + $2))
  report "$1" "NOT RUN" 0 "$told"
}

: >"$summary"
report part outcome seconds "last line"

part machine 3 "$python" benchmarks/machine.py
parity "parity, float32" 14 "${tests[@]}" -m gpu tests/test_golden.py tests/test_golden_segmentation.py
parity "parity, bf16" 10 "${tests[@]}" -m gpu tests/test_bf16.py
part kernels 14 "${tests[@]}" -m gpu tests/test_ops*.py
part "graphs, waits" 5 "${tests[@]}" tests/test_graphs.py tests/test_no_host_wait.py
part "model S" 19 "$python" benchmarks/model.py --device cuda --models S --batch 256 1 32 64 --seconds 2 --profile \
  --output "$out/model-s.json"
part train 15 "$python" benchmarks/train.py --device cuda --parts dense dyvm --batch 256 --seconds 4 --profile \
  --output "$out/train.json"
part "model S, 512" 9 "$python" benchmarks/model.py --device cuda --models S --img-size 512 --batch 256 --seconds 2 \
  --output "$out/model-s-512.json"
# without torch.compile, which takes half a minute for each shape
part "benchmark ops" 5 "$python" benchmarks/ops.py --device cuda --precision bf16 --batch 256 --rounds 10 \
  --no-compile --output "$out/ops.json"
part layout 2 "$python" benchmarks/gpu_plan.py --device cuda --tokens 197 --active 1.0 --rounds 3 --seconds 0.1
part "model T and B" 3 "$python" benchmarks/model.py --device cuda --models T B --batch 256 1 16 64 --seconds 0.5 \
  --no-compile --output "$out/model-tb.json"
part goals 1 "$python" benchmarks/goals.py "$out" --output "$out/goals.json"

echo
cat "$summary"
exit "$any_failed"
