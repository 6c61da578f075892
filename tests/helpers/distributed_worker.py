"""What the processes of test_distributed.py run: `python distributed_worker.py CASE`, with a
launcher's environment.
"""

import os
import signal
import sys
import time

import torch

from utils import preemption
from utils.distributed import Distributed, init_distributed
from utils.errors import UserError
from utils.logging import Averages
from utils.program import run_main


def say(*words: object) -> None:
    sys.stdout.write(
        " ".join(map(str, words)) + "\n"
    )  # in one piece, since both ranks may share a pipe
    sys.stdout.flush()


def collectives(distributed: Distributed) -> None:
    rank = distributed.rank
    assert distributed.world_size == 2 and distributed.is_main == (rank == 0)
    assert [distributed.agree_any(flag) for flag in (False, rank == 0, rank == 1, True)] == [
        False,
        True,
        True,
        True,
    ]

    counts = distributed.all_reduce_sum([2.0**53 - 2 if rank else 1.0, 0.1])
    assert counts.dtype == torch.float64 and counts.tolist() == [2.0**53 - 1, 0.2]

    gathered = distributed.gather_objects({"rank": rank, "names": ["é"] * (rank + 1)})
    expected = [{"rank": 0, "names": ["é"]}, {"rank": 1, "names": ["é", "é"]}]
    assert gathered == (expected if rank == 0 else None)

    averages = Averages()
    averages.update(3 - rank, loss=torch.tensor(1.0 + rank))
    assert averages.means(distributed) == {"loss": (3 * 1.0 + 2 * 2.0) / 5}


def killed_peer(distributed: Distributed) -> None:
    """Rank 1 dies, and rank 0 meets that in a collective."""
    if distributed.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def killed_peer_unnoticed(distributed: Distributed) -> None:
    """Rank 1 dies while rank 0 is busy elsewhere, as in a NCCL kernel that never ends."""
    if distributed.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(50)


def busy_peer(distributed: Distributed) -> None:
    """Rank 1 takes longer than a silent peer is allowed to; it is alive, so nothing may end."""
    if distributed.rank == 1:
        time.sleep(5)
    distributed.barrier()


def failing_peer(distributed: Distributed) -> None:
    if distributed.rank == 1:
        raise UserError("image 17 of rank 1\ncannot be decoded")
    distributed.barrier()


def preempted(distributed: Distributed) -> int:
    """Steps until a signal has come to any rank; both say after how many."""
    preemption.install()
    say("ready")
    step = 0
    while not distributed.agree_any(preemption.requested()):
        step += 1
        time.sleep(0.01)
    say("stopped", step, preemption.received())
    return preemption.EXIT_CODE


def restarted(distributed: Distributed) -> None:
    """Rank 1 of the first attempt dies; torchrun starts both again."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt == 0 and distributed.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()
    time.sleep(3)  # long enough for numbers left over from the first attempt to look like silence
    say("attempt", attempt, "ended")


CASES = {
    case.__name__: case
    for case in (
        collectives,
        killed_peer,
        killed_peer_unnoticed,
        busy_peer,
        failing_peer,
        preempted,
        restarted,
    )
}


def main() -> int:
    distributed = init_distributed("cpu", silence_s=2, join_s=60)
    code = CASES[sys.argv[1]](distributed)
    distributed.shutdown()
    return code or 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_main(main)
