"""What the choice of tokens is worth to a dense model, without any training.

    python benchmarks/oracle.py --model-path output/dense/best_checkpoint.pth --pruning-layer 2 \\
        --keep 0.5 0.2 -- --data-path FOLDER

The model keeps a share of its tokens before one layer, as evaluation does, and answers without the
others: those that matter most by the gradient of its own loss, which knows the label
(`importance`); the patches of the object, where the data set knows it; the largest; evenly spread
ones; random ones. What follows `--` are flags of main.py for the data.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import options
from benchmarks import flags, records
from engine import to_device
from evaluation.runs import split_words
from models import VisionMamba
from models.build import recorded_arguments, restore
from models.importance import with_importance
from models.reduction import Reduction, staged_before
from models.reduction.selection import LargestNorm, RandomTokens, Selection, StaticTokens
from tasks import Experiment, ObjectMeter, task_of_checkpoint
from utils import arguments
from utils.checkpoint import load_checkpoint
from utils.distributed import init_distributed
from utils.errors import UsageError, UserError
from utils.files import sha256_of, write_json
from utils.logging import Progress
from utils.program import run_main
from utils.tables import text_table

DENSE, IMPORTANCE, OBJECT = "all tokens", "importance", "object"
BLIND = {"norm": LargestNorm, "static": StaticTokens, "random": RandomTokens}


class Given(Selection):
    """Keeps the tokens of the largest given values [B, M]."""

    name = "given"

    def __init__(self, token_keep: Sequence[float], values: Tensor):
        super().__init__(token_keep)
        self.values = values

    def score(self, stage, tokens, mixed, policy, model):
        return self.values.gather(1, tokens.origin)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the words after `--`."""
    own, words = split_words(sys.argv[1:], {})
    parser = flags.build_parser("oracle.py", __doc__)
    parser.add_argument("--model-path", required=True, metavar="FILE", help="a dense checkpoint")
    parser.add_argument("--pruning-layer", type=arguments.positive, required=True, metavar="LAYER")
    parser.add_argument("--keep", type=arguments.ratio, nargs="+", default=[0.5, 0.2], metavar="K")
    parser.add_argument(
        "--images",
        type=arguments.positive,
        default=1000,
        help="of the validation set, evenly spread; default: 1000",
    )
    return flags.parse(parser, own), words


def prepare(args: argparse.Namespace, words: Sequence[str]) -> tuple[Experiment, VisionMamba]:
    """The checkpoint's validation data and its model. Raises UsageError, UserError."""
    checkpoint = load_checkpoint(args.model_path)
    task = task_of_checkpoint(checkpoint)
    recorded = recorded_arguments(checkpoint, task.recorded)
    if not recorded or recorded["method"] != "dense" or task.name != "classification":
        raise UserError(
            f"{args.model_path} is not a dense classifier that main.py has trained: its data are "
            "not known, or it is reduced already"
        )
    told = ["--eval", "--model-path", args.model_path, "--device", args.device, *words]
    told += ["--amp", "off"]
    experiment = Experiment.prepare(
        options.parse(told, recorded), init_distributed(args.device), train=False
    )
    model = restore(experiment.model(experiment.spec), checkpoint, args.model_path)
    if args.pruning_layer >= model.depth:
        raise UsageError(
            f"--pruning-layer {args.pruning_layer}: the model has {model.depth} layers; give 1 to "
            f"{model.depth - 1}"
        )
    for keep in args.keep:
        if not int(keep * model.num_patches):
            raise UsageError(f"--keep {keep:g} leaves none of {model.num_patches} patches")
    return experiment, model.eval().requires_grad_(False)


def choices(
    model: VisionMamba,
    experiment: Experiment,
    layer: int,
    images: Tensor,
    targets: Tensor,
    indices: Tensor,
) -> dict[str, Callable[[list[float]], Reduction]]:
    """{name of a way: from the share to keep to a reduction of this batch}."""

    def loss(result) -> Tensor:
        return torch.nn.functional.cross_entropy(result.logits, targets, reduction="sum")

    values = {IMPORTANCE: with_importance(model, images, loss, (layer,)).importance[0]}
    data = experiment.data
    if data.val.knows_objects:

        def region(size):
            task, size_of_model = experiment.task, model.patch_embed.img_size
            return task.seen_region(size, args=experiment.args, img_size=size_of_model)

        mass = ObjectMeter(model, data.val, region, experiment.device).masses(indices)
        values[OBJECT] = mass.to(images)
    given = {name: lambda keep, of=of: Given(keep, of) for name, of in values.items()}
    return given | BLIND


@torch.no_grad()
def measure(args: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Top-1 in percent: {"all tokens": number, way: {share: number}}."""
    experiment, model = prepare(args, words)
    right: dict[tuple[str, float], int] = {}
    count, seen = experiment.data.num_val, 0
    wanted = torch.linspace(0, count - 1, min(args.images, count)).long()
    loader = experiment.data.val_loader
    for batch in Progress(loader.batches(), "images", total=len(loader)):
        chosen = torch.isin(batch.indices, wanted)
        if not chosen.any():
            continue
        batch = to_device(batch, experiment.device)
        images, targets, indices = (
            part[chosen.to(part.device)] for part in (batch.images, batch.targets, batch.indices)
        )
        seen += len(images)

        def score(name: str, keep: float, images=images, targets=targets) -> None:
            hits = (model(images).logits.argmax(1) == targets).sum().item()
            right[name, keep] = right.get((name, keep), 0) + hits

        score(DENSE, 1.0)
        layer = args.pruning_layer
        for name, make in choices(model, experiment, layer, images, targets, indices).items():
            for keep in args.keep:
                with staged_before(model, (layer,), make([keep])):
                    score(name, keep)
    top1 = {key: 100 * hits / seen for key, hits in right.items()}
    ways = dict.fromkeys(name for name, _ in top1 if name != DENSE)
    return {
        "data_set": experiment.args.data_set,
        "images": seen,
        "checkpoint_sha256": sha256_of(args.model_path),
        "input_size": list(model.patch_embed.img_size),
        "pruning_layer": args.pruning_layer,
        "top1": {DENSE: top1[DENSE, 1.0]}
        | {way: {f"{keep:g}": top1[way, keep] for keep in args.keep} for way in ways},
    }


def table(measured: dict[str, Any]) -> str:
    top1 = dict(measured["top1"])
    dense = top1.pop(DENSE)
    shares = list(next(iter(top1.values())))
    rows = [[DENSE, *[f"{dense:.1f}"] * len(shares)]]
    rows += [[way, *(f"{of[share]:.1f}" for share in shares)] for way, of in top1.items()]
    return text_table(rows, ["top-1, %, keeping", *shares])


def main() -> None:
    args, words = parse_args()
    record = records.head("oracle.py", args.device) | measure(args, words)
    print(table(record))
    if args.output:
        write_json(args.output, record)


if __name__ == "__main__":
    run_main(main)
