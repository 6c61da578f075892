"""What saving costs: training with a save every minute against training without, in alternate blocks of one process.

    python benchmarks/saving.py [--device cpu|cuda] [--model vim_tiny] [--batch 16] [--seconds 60] [--output FILE]

Each block lasts `--seconds`; with saving, one save begins in its middle, as `--save-minutes 1` does for 60 seconds, and
whatever of it is left at the end of the block is waited for. All saves are read back, or no ratio is reported.
The clock is disturbed by whatever else runs; processor time includes the thread that writes.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import options
import resume
from builders import build_training, model_image_size
from datasets import build_data
from engine import Training, accumulate_gradients, gradient_norm
from utils.checkpoint import is_intact
from utils.distributed import Distributed
from utils.logging import Averages


def endless(data):
    epoch = 0
    while True:
        yield from data.train_batches(epoch)
        epoch += 1


def block(run: Training, batches, args: argparse.Namespace, alone: Distributed, seconds: float,
          saver=None) -> dict[str, float]:
    """Train for `seconds` -> images/s, and images per second of processor time."""
    images, saved, begin, begin_cpu = 0, saver is None, time.perf_counter(), time.process_time()
    while (now := time.perf_counter() - begin) < seconds:
        batch = next(batches)
        measured = accumulate_gradients(run, [batch], args, alone)
        run.guard.step(gradient_norm(run, None), measured["loss"], batch.indices)
        run.ema.update(run.model)
        images += len(batch.images)
        if not saved and now > seconds / 2:
            saver.save(Averages())
            saved = True
    if saver is not None:
        saver.writer.wait()
    if alone.device.type == "cuda":
        torch.cuda.synchronize()
    return {"images_per_s": images / (time.perf_counter() - begin),
            "images_per_cpu_s": images / (time.process_time() - begin_cpu)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="vim_tiny")
    parser.add_argument("--input-size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args = options.parse(["--model", given.model, "--input-size", str(given.input_size), "--batch-size",
                              str(given.batch), "--num-workers", "0", "--device", given.device, "--output_dir", folder])
        alone = Distributed(torch.device(given.device))
        data = build_data(args, model_image_size(args))
        run = build_training(args, data, alone)
        saver = resume.Saver(run, resume.identity(args, 1, data), data, args, alone)
        batches = endless(data)
        block(run, batches, args, alone, min(5, given.seconds))  # warm-up
        rounds = []
        for _ in range(given.rounds):
            rounds.append({"no_saving": block(run, batches, args, alone, given.seconds),
                           "saving": block(run, batches, args, alone, given.seconds, saver)})
            if not is_intact(saver.writer.newest):
                sys.exit("error: the save is not whole; no ratio is reported")
        size = saver.writer.newest.stat().st_size
        saver.close()

    def ratio(kind: str) -> float:
        return sum(pair["saving"][kind] for pair in rounds) / sum(pair["no_saving"][kind] for pair in rounds)

    ratios = {kind: ratio(kind) for kind in ("images_per_s", "images_per_cpu_s")}
    print(f"a save of {size / 1e6:.0f} MB every {given.seconds:g} s: {ratios['images_per_s']:.4f} of the throughput "
          f"without ({ratios['images_per_cpu_s']:.4f} by processor time)")
    if given.output:
        device = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or platform.machine()
        given.output.write_text(json.dumps({
            "command": "python " + " ".join(["benchmarks/saving.py", *sys.argv[1:]]), "device": device,
            "threads": torch.get_num_threads(), "load_average": os.getloadavg(), "torch": torch.__version__,
            "python": platform.python_version(), "checkpoint_bytes": size, "rounds": rounds, "ratio": ratios,
        }, indent=2) + "\n")


if __name__ == "__main__":
    main()
