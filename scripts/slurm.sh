#!/usr/bin/env bash
#SBATCH --job-name=dyvm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#
# Trains a recipe on one or more nodes of a SLURM cluster; submitted in the repository's root:
#
#   MODEL_PATH=vim_small.pth DATA_PATH=/path/to/imagenet OUTPUT=/shared/runs/vim-s \
#     sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --time=24:00:00 scripts/slurm.sh scripts/vim-s.sh [flags]
#
# 180 seconds before the time limit SLURM signals this script: the workers save and end, the job is put back into the
# queue, and --resume auto goes on from what was saved. A preemption or a lost node comes out the same by --requeue.
# OUTPUT must be seen by all nodes.
set -euo pipefail

fail() {
  echo "slurm: $*" >&2
  exit 1
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a job script; submit it with: sbatch scripts/slurm.sh scripts/vim-s.sh"
# SLURM runs a copy of this file from its own folder, so the repository is found where the job was submitted.
cd "$SLURM_SUBMIT_DIR"
[[ -f scripts/common.sh ]] || fail "$SLURM_SUBMIT_DIR is not the repository's root; submit the job there"
recipe="${1:-}"
[[ -f $recipe ]] || fail "'$recipe' is not a recipe; name one of scripts/*.sh after scripts/slurm.sh"
shift

# Once here, so that nodes that share the user's cache find the environment ready.
bash scripts/setup.sh >&2

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES="$SLURM_NNODES" RDZV_ID="$SLURM_JOB_ID"
# A port that follows the job, for jobs that share their first node.
export RDZV_ENDPOINT="${hosts[0]}:$((20000 + SLURM_JOB_ID % 10000))"
export MAX_RESTARTS="${MAX_RESTARTS:-3}"

preempted=
step=
trap 'preempted=1; [[ -z $step ]] || kill -USR1 "$step"' USR1
srun bash "$recipe" --resume auto "$@" &
step=$!
status=0
wait "$step" || status=$?
# The trap interrupts wait while the workers are still saving.
while kill -0 "$step" 2>/dev/null; do
  status=0
  wait "$step" || status=$?
done

if [[ -n $preempted && $status -ne 0 ]]; then
  echo "slurm: job $SLURM_JOB_ID was interrupted; it goes back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit
fi
exit "$status"
