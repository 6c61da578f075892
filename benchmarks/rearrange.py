"""The re-arrangement of kept before dropped tokens: a batched gather against a loop over images.

    python benchmarks/rearrange.py [--device cpu|cuda] [--batch 64] [--patches 196] [--width 384]
        [--output FILE]

Both move the same tensors: the tokens (hidden + residual, the sum that the score predictor has
read), the policy and the original indexes. Both are timed in turn, forward alone and forward +
backward, which is how training uses it; the speed is printed only if both give the same tokens and
the same gradients.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import flags, records
from models.layouts import MiddleClassToken, reordered, take
from models.pruning import kept_first
from utils import arguments
from utils.errors import UserError
from utils.files import write_json
from utils.program import run_main
from utils.timing import interleaved


def by_image(policy, sequence, origin, middle):
    """Image by image; the class token is taken out and put back with torch.cat."""
    sequences, policies, origins = [], [], []
    for image in range(len(policy)):
        kept, dropped = policy[image].nonzero()[:, 0], (policy[image] == 0).nonzero()[:, 0]
        order, place = torch.cat([kept, dropped]), len(kept) // 2
        tokens = sequence[image]
        patches = torch.cat([tokens[:middle], tokens[middle + 1 :]])[order]
        sequences.append(torch.cat([patches[:place], tokens[middle : middle + 1], patches[place:]]))
        policies.append(policy[image][order])
        origins.append(origin[image][order])
    return torch.stack(sequences), torch.stack(policies), torch.stack(origins)


def by_batch(policy, sequence, origin, middle):
    """As in `DynamicVisionMamba`."""
    order, kept = kept_first(policy)
    class_slots = MiddleClassToken().class_slots(kept)
    index = reordered(order, (middle,), class_slots, sequence.shape[1])
    return take(sequence, index), take(policy, order), take(origin, order)


def main():
    parser = flags.build_parser("rearrange.py", __doc__)
    parser.add_argument("--batch", type=arguments.positive, default=64)
    parser.add_argument("--patches", type=arguments.positive, default=196)
    parser.add_argument("--width", type=arguments.positive, default=384)
    flags.add_rounds(parser, 20)
    args = flags.parse(parser)
    torch.manual_seed(0)
    policy = (torch.rand(args.batch, args.patches, device=args.device) < 0.7).float()
    sequence = torch.randn(
        args.batch, args.patches + 1, args.width, device=args.device, requires_grad=True
    )
    origin = torch.arange(args.patches, device=args.device).expand(args.batch, -1)
    inputs = (policy, sequence, origin, args.patches // 2)
    weight = torch.randn_like(sequence)

    def forward(function):
        with torch.no_grad():
            return function(*inputs)

    def train(function):
        return torch.autograd.grad(function(*inputs)[0], sequence, weight)

    ways = {"loop over images": by_image, "whole batch": by_batch}
    record = {}
    for what, run in (("forward", forward), ("forward + backward", train)):
        for loop, ours in zip(*(run(function) for function in ways.values()), strict=True):
            if not torch.equal(loop, ours):
                raise UserError(f"the two disagree in {what}; no speed is reported")
        calls = {name: partial(run, function) for name, function in ways.items()}
        times = interleaved(calls, args.device, args.rounds)
        medians = {name: row["ms"] for name, row in times.items()}
        record[what] = {
            "ms": medians,
            "ratio": medians["loop over images"] / medians["whole batch"],
        }
    rows = [
        [what, *(f"{value:.2f}" for value in measured["ms"].values()), f"{measured['ratio']:.1f}"]
        for what, measured in record.items()
    ]
    print(tabulate(rows, headers=["ms, median", *ways, "ratio"]))
    print("tokens and gradients equal to the last bit")
    if args.output:
        settings = {name: getattr(args, name) for name in ("batch", "patches", "width", "rounds")}
        write_json(args.output, {**records.head("rearrange.py", args.device), **settings, **record})


if __name__ == "__main__":
    run_main(main)
