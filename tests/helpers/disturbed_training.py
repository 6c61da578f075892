"""main.py with disturbances: `python disturbed_training.py NAME=VALUE... -- FLAGS`

nan=RANK:STEP     an image of that rank is not a number in that step of every epoch
slow=SECONDS      each step takes so much longer
pids=FOLDER       each rank leaves its process number there, in a file named after the rank
hash=1            instead of the last evaluation, each rank prints a hash of its weights
"""

import hashlib
import os
import sys
import time
from pathlib import Path

import main
from loading.data import Data
from utils.program import run_main

RANK = int(os.environ.get("RANK", 0))


def disturb(nan: str = "-1:0", slow: str = "0") -> None:
    """Wrap `Data.train_batches`."""
    rank, poisoned = map(int, nan.split(":"))
    batches = Data.train_batches

    def train_batches(self, epoch, start_step=0):
        for step, batch in enumerate(batches(self, epoch, start_step), start=start_step):
            if rank == RANK and step == poisoned:
                batch.images[3] = float("nan")
            time.sleep(float(slow))
            yield batch

    Data.train_batches = train_batches


def print_hash(run, *_: object) -> None:
    digest = hashlib.sha256()
    for name, value in run.model.state_dict().items():
        assert value.isfinite().all(), name
        digest.update(value.numpy().tobytes())
    print("weights", digest.hexdigest())


if __name__ == "__main__":
    end = sys.argv.index("--")
    disturbances = dict(word.split("=") for word in sys.argv[1:end])
    if "pids" in disturbances:
        (Path(disturbances.pop("pids")) / str(RANK)).write_text(str(os.getpid()))
    if disturbances.pop("hash", None):
        main.evaluate_best = print_hash
    disturb(**disturbances)
    run_main(lambda: main.main(sys.argv[end + 1 :]))
