#!/usr/bin/env bash
# Segmentation from end to end on a CPU: scenes composed of Fashion-MNIST's garments and digits, a dense segmenter, its
# dynamic student, the two side by side, and a report.
#
#   bash scripts/seg/demo.sh [flags of main.py for both trainings]
#   DECODER=light bash scripts/seg/demo.sh
#
# Fashion-MNIST: the Debian package dataset-fashion-mnist, or FASHION_MNIST=/folder/with/its/idx/files.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$ROOT/scripts/help.sh"
# The demo replaces its earlier run in its own folder, but not what lies in a folder that OUTPUT names.
[[ -n ${OUTPUT:-} ]] || set -- --overwrite "$@"
DECODER="${DECODER:-upernet}"
OUTPUT="${OUTPUT:-$ROOT/output/seg-demo-$DECODER}"
SCENES="${SCENES:-$ROOT/output/scenes}"
TRAIN="${TRAIN:-800}"
VAL="${VAL:-150}"
# A step with the light decoder takes half as long: as many seconds of training for both.
EPOCHS_DENSE="${EPOCHS_DENSE:-$([[ $DECODER == upernet ]] && echo 4 || echo 8)}"
EPOCHS_DYVM="${EPOCHS_DYVM:-$([[ $DECODER == upernet ]] && echo 2 || echo 4)}"
EPOCH_STEPS="${EPOCH_STEPS:-200}"
LR_DENSE="${LR_DENSE:-3e-3}"
LR_DYVM="${LR_DYVM:-2e-3}"

# Patches of 16 pixels: 64 of them. Small scenes and a short run want less augmentation than ADE20K.
SCENES_RECIPE=(
  --data-set ADE20K --data-path "$SCENES" --model-kwargs patch_size=16 --input-size 128 --decoder "$DECODER"
  --batch-size 8 --epoch-steps "$EPOCH_STEPS" --unscale-lr --sched poly --sched-on-updates --warmup-epochs 0.4
  --min-lr 0 --weight-decay 0.05 --clip-grad 5 --scale-range 0.9 1.1 --cat-max-ratio 1 --no-photometric
  --throughput-seconds 0
)

step() {
  printf '\n== %s\n' "$*" >&2
}

PYTHON="$(bash "$ROOT/scripts/setup.sh" | tail -n 1)"
SECONDS=0

if [[ ! -f $SCENES/classes.txt ]]; then
  step "1/5 $TRAIN + $VAL scenes of 128 pixels"
  "$PYTHON" "$ROOT/scripts/seg/scenes.py" --output "$SCENES" --train "$TRAIN" --val "$VAL" --size 128 \
    ${FASHION_MNIST:+--data-path "$FASHION_MNIST"}
fi

step "2/5 dense vim_micro with decoder $DECODER, $EPOCHS_DENSE epochs"
"$PYTHON" "$ROOT/main.py" --method dense --model vim_micro --epochs "$EPOCHS_DENSE" --lr "$LR_DENSE" \
  "${SCENES_RECIPE[@]}" --output_dir "$OUTPUT/dense" "$@"

step "3/5 its dynamic student, $EPOCHS_DYVM epochs"
"$PYTHON" "$ROOT/main.py" --method dyvm --model dyvm_vim_micro --model-path "$OUTPUT/dense/best_checkpoint.pth" \
  --epochs "$EPOCHS_DYVM" --lr "$LR_DYVM" --token-keep-ratio 0.7 --block-keep-ratio 0.8 \
  "${SCENES_RECIPE[@]}" --output_dir "$OUTPUT/dyvm" "$@"

step "4/5 evaluation: dense against dynamic"
"$PYTHON" "$ROOT/main.py" --eval --model-path "$OUTPUT/dyvm/best_checkpoint.pth" \
  --dense-path "$OUTPUT/dense/best_checkpoint.pth" --output_dir "$OUTPUT/dyvm"

step "5/5 report"
"$PYTHON" "$ROOT/report.py" "$OUTPUT/dyvm"

step "the demo took $((SECONDS / 60)) min $((SECONDS % 60)) s"
echo "report:   $OUTPUT/dyvm/report.html"
echo "pictures: $OUTPUT/dyvm/segmentation"
