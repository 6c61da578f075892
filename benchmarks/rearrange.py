"""The re-arrangement of kept before dropped tokens: one gather over the batch against a Python loop over images.

    python benchmarks/rearrange.py [--device cpu|cuda] [--batch 64] [--patches 196] [--width 384] [--output FILE]

Both are timed in turn; the speed is printed only if both give the same tokens.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.layouts import MiddleClassToken, reordered, take
from models.pruning import kept_first


def by_image(policy, hidden, residual, origin, middle):
    """Image by image, hidden and residual apart, the class token put back with torch.cat."""
    sequences, policies, origins = [], [], []
    for image in range(len(policy)):
        kept, dropped = policy[image].nonzero()[:, 0], (policy[image] == 0).nonzero()[:, 0]
        order, place = torch.cat([kept, dropped]), len(kept) // 2
        moved = []
        for tokens in (hidden[image], residual[image]):
            patches = torch.cat([tokens[:middle], tokens[middle + 1:]])[order]
            moved.append(torch.cat([patches[:place], tokens[middle:middle + 1], patches[place:]]))
        sequences.append(moved[0] + moved[1])
        policies.append(policy[image][order])
        origins.append(origin[image][order])
    return torch.stack(sequences), torch.stack(policies), torch.stack(origins)


def by_batch(policy, hidden, residual, origin, middle):
    """As `DynamicVisionMamba` does it."""
    order, kept = kept_first(policy)
    index = reordered(order, (middle,), MiddleClassToken().positions(kept))
    return take(hidden + residual, index), take(policy, order), take(origin, order)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--patches", type=int, default=196)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    policy = (torch.rand(args.batch, args.patches, device=args.device) < 0.7).float()
    hidden, residual = torch.randn(2, args.batch, args.patches + 1, args.width, device=args.device)
    origin = torch.arange(args.patches, device=args.device).expand(args.batch, -1)
    inputs = (policy, hidden, residual, origin, args.patches // 2)
    for loop, ours in zip(by_image(*inputs), by_batch(*inputs), strict=True):
        if not torch.equal(loop, ours):
            sys.exit("error: the two disagree; no speed is reported")
    times = {"loop over images": [], "whole batch": []}
    for _ in range(args.rounds):
        for name, function in zip(times, (by_image, by_batch), strict=True):
            start = time.perf_counter()
            function(*inputs)
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    medians = {name: 1e3 * statistics.median(samples) for name, samples in times.items()}
    ratio = medians["loop over images"] / medians["whole batch"]
    print(tabulate([[name, f"{value:.2f}"] for name, value in medians.items()], headers=["", "ms, median"]))
    print(f"ratio {ratio:.1f}; equal to the last bit")
    if args.output:
        args.output.write_text(json.dumps({**vars(args), "output": None, "ms": medians, "ratio": ratio,
                                           "threads": torch.get_num_threads(), "torch": torch.__version__}, indent=2))


if __name__ == "__main__":
    main()
