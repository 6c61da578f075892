"""Operations of small models of CLUTTER's images, without weights."""

import options
from evaluation.budgets import Priced
from models.build import ModelSpec, build_model

TRAINING = """--model vim_micro --input-size 56 --model-kwargs patch_size=8 depth=6 embed_dim=16
    d_state=4 --batch-size 10 --epochs 1 --warmup-epochs 0 --lr 1e-2 --unscale-lr --aa none
    --no-repeated-aug --mixup 0 --cutmix 0 --num-workers 0 --no-model-ema --device cpu""".split()
STAGE = ["--pruning-layers", "2"]


def build(spec):
    return build_model(spec, 10)


def spec(*more):
    given = ["--method", "token", *TRAINING, *STAGE, "--model-path", "x", *more]
    return ModelSpec.from_args(options.parse(given))


def static(*more):
    return Priced(spec("--token-strategy", "static", *more), build)
