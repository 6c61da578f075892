# Sourced by the recipes and by eval.sh: the environment, the checks of what the user gave, and the launch.
#
#   DATA_PATH      folder of the data set, with train/ and val/
#   MODEL_PATH     checkpoint: the dense teacher for the recipes, the model to evaluate for eval.sh
#   GPUS           processes on this machine, one for each GPU (default: all visible GPUs, else one process on the CPU)
#   OUTPUT         folder of the run (default: output/<recipe> in the repository)
#   PYTHON         a Python that has the requirements (default: the environment of setup.sh)
#   MAX_RESTARTS   how often torchrun starts the workers again after one died (default 0)
#   DRY_RUN=1      print the command and stop
#
# Flags on the command line go to main.py after those of the recipe, so they win.
# shellcheck shell=bash
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NAME="$(realpath --relative-to="$ROOT/scripts" "$0")" # vim-s, ablation/static
NAME="${NAME%.sh}"

# The part of the paper's recipe that all models share. The learning rate is scaled by the total batch / 512, so it
# holds for any number of GPUs; --min-lr and --warmup-lr are not scaled.
# shellcheck disable=SC2034
PAPER_RECIPE=(
  --epochs 30 --sched cosine --warmup-epochs 5 --warmup-lr 1e-5 --min-lr 1e-6
  --opt adamw --weight-decay 1e-8 --drop-path 0 --model-ema-decay 0.99996 --amp off
  --repeated-aug --aa rand-m9-mstd0.5-inc1 --color-jitter 0.3 --train-interpolation bicubic --reprob 0.25 --remode pixel
  --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --eval-crop-ratio 0.875
  --token-pruning-weight 10 --block-pruning-weight 10
)

# Vim-S, which the ablations vary.
# shellcheck disable=SC2034
VIM_S_RECIPE=(
  "${PAPER_RECIPE[@]}" --model dyvm_vim_small --batch-size 64 --lr 5e-5 --token-keep-ratio 0.7 --block-keep-ratio 0.8
)

# fail EXIT_CODE MESSAGE: 1 for what lies outside the command, 2 for a mistake in it, as in main.py.
fail() {
  echo "$NAME: $2" >&2
  exit "$1"
}

# require_path VARIABLE WHAT_IT_IS
require_path() {
  local path="${!1:-}"
  [[ -n $path ]] || fail 2 "$1 is not set; it names $2: $1=/path/to/it bash scripts/$NAME.sh"
  [[ -e $path ]] || fail 1 "$1=$path does not exist; it names $2"
}

dry_run() {
  [[ -n ${DRY_RUN:-} && $DRY_RUN != 0 ]]
}

visible_gpus() {
  local count
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    count="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true)"
  else
    count="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)"
  fi
  echo "$((count > 0 ? count : 1))"
}

# launch FLAGS_OF_MAIN...: main.py under torchrun, on this machine or, with RDZV_ENDPOINT, RDZV_ID and NNODES
# (slurm.sh sets them), as one of several. SIGUSR1 reaches the workers as SIGTERM does: they have 30 seconds to save.
launch() {
  local gpus="${GPUS:-$(visible_gpus)}" python="${PYTHON:-python3}" rendezvous=(--standalone) command restarts
  restarts="${MAX_RESTARTS:-0}"
  [[ $gpus =~ ^[1-9][0-9]*$ ]] || fail 2 "GPUS=$gpus is not a number of processes, 1 or more"
  dry_run || python="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)"
  if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    rendezvous=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-id="$RDZV_ID" --rdzv-endpoint="$RDZV_ENDPOINT")
  fi
  command=(
    "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$gpus"
    --max-restarts="$restarts" --signals-to-handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    "$ROOT/main.py" "$@"
  )
  # A single process needs no launcher, which would bury an error's one line under its own trace.
  if [[ $gpus -eq 1 && $restarts -eq 0 && -z ${RDZV_ENDPOINT:-} ]]; then
    command=("$python" "$ROOT/main.py" "$@")
  fi
  if dry_run; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  # PyTorch asks for the name of a user that may be a bare number (docker run --user 12345).
  export USER="${USER:-$(id -un 2>/dev/null || id -u)}"
  # When a process is lost, the others say so in one line; PyTorch's C++ part would add pages.
  export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-FATAL}"
  exec "${command[@]}"
}

# train_dyvm FLAGS_OF_MAIN...: a DyVM student from a dense teacher, on ImageNet-1K.
train_dyvm() {
  require_path MODEL_PATH "the checkpoint of the dense teacher"
  require_path DATA_PATH "the folder of ImageNet-1K, with train/ and val/"
  launch --method dyvm --data-set IMNET --data-path "$DATA_PATH" --model-path "$MODEL_PATH" \
    --output_dir "${OUTPUT:-$ROOT/output/$NAME}" "$@"
}
