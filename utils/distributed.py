"""One process or many, started by torchrun, by SLURM's srun or directly; none hangs if one dies.

With CUDA the process group is "cpu:gloo,cuda:nccl": gradients travel by NCCL, while what the ranks
agree on (flags, counts, objects) are CPU tensors that travel by gloo and never wait for the GPU's
queue.
"""

import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UsageError, UserError, first_line

# A collective may wait long for a rank that is alive but slow (measuring throughput alone, a cold
# file system); dead ranks are detected by the watchdog.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
JOIN_SECONDS = 300.0
SILENCE_SECONDS = 40.0
RELEASE_SECONDS = 0.2


class Launch(NamedTuple):
    """Where a launcher put this process, and where the processes meet."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    port: int


def read_launch(env: Mapping[str, str]) -> Launch | None:
    """The launch described by torchrun's or srun's environment; None without a launcher.

    MASTER_ADDR and MASTER_PORT are respected under SLURM too; by default the processes meet on the
    step's first node, at a port derived from the job's number. Raises UserError if the environment
    is incomplete.
    """
    try:
        if "RANK" in env and "WORLD_SIZE" in env:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            rank, world_size, local_rank, host, port = (env[name] for name in names)
            return Launch(int(rank), int(world_size), int(local_rank), host, int(port))
        # SLURM_NTASKS is set in a batch script's own environment too, the step's size only in
        # processes that srun starts.
        if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            return Launch(
                int(env["SLURM_PROCID"]),
                int(env["SLURM_STEP_NUM_TASKS"]),
                int(env["SLURM_LOCALID"]),
                env.get("MASTER_ADDR") or first_node(env["SLURM_STEP_NODELIST"]),
                int(env.get("MASTER_PORT") or 20000 + int(env["SLURM_JOB_ID"]) % 20000),
            )
    except KeyError as missing:
        raise UserError(
            f"the launcher's environment lacks {missing.args[0]}: start with torchrun or srun, or "
            "unset RANK and WORLD_SIZE for a single process"
        ) from None
    except ValueError as error:
        raise UserError(f"the launcher's environment is not understood: {error}") from None
    return None


def first_node(nodelist: str) -> str:
    """First host of SLURM's compressed list: `gpu[07-09,12],login1` -> `gpu07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else nodelist


@dataclass(frozen=True)
class Distributed:
    """This process among its peers. All ranks must call its methods alike."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    watchdog: Optional["Watchdog"] = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here (the hosts; queued GPU work may still run)."""
        self.agree_any(False)

    def agree_any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. One byte without a wait for the GPU: cheap."""
        if self.world_size == 1:
            return bool(flag)
        votes = torch.tensor([bool(flag)], dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes)

    def all_reduce_sum(self, values: Tensor | Sequence[float]) -> Tensor:
        """Sum over the ranks in float64, on the CPU, in the shape of `values`.

        Counts stay exact up to 2^53.
        """
        if isinstance(values, Tensor):
            total = values.detach().to("cpu", torch.float64, copy=True)
        else:
            total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def gather_objects(self, value: Any) -> list[Any] | None:
        """`value` of every rank, by rank, on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered)
        return gathered

    def on_main(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, on every rank; a UserError that it raises there is
        raised on every rank.
        """
        if self.world_size == 1:
            return action()
        outcome: list[tuple[Any, UserError | None]] = [(None, None)]
        if self.is_main:
            try:
                outcome = [(action(), None)]
            except UserError as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    def shutdown(self) -> None:
        """Orderly end of all ranks. Not after an error: it waits for every rank."""
        if self.world_size > 1:
            self.barrier()
            self.watchdog.stop()
            # A gloo thread releases a collective's tensor a moment after the collective, and takes
            # Python's lock to do so. If Python is exiting by then, that aborts the process:
            # destroying the group waits for its threads, but not while a DDP module holds the
            # group too.
            time.sleep(RELEASE_SECONDS)
            dist.destroy_process_group()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over all processes of values [...] on their device, without making the host wait.

    For code that has no `Distributed`, such as a loss; in a single process, the values themselves.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def init_distributed(
    device: str | torch.device = "auto",
    *,
    silence_s: float = SILENCE_SECONDS,
    join_s: float = JOIN_SECONDS,
) -> Distributed:
    """Join the other processes if a launcher started several, else be the only one.

    `device` is "auto" (a GPU if there is one), "cpu" or "cuda"; with CUDA each process takes the
    GPU of its local rank. A peer that is silent for `silence_s` seconds ends this process with one
    line.

    Raises UserError for a missing device, and if not all processes join within `join_s` seconds.
    """
    launch = read_launch(os.environ)
    local_rank = launch.local_rank if launch else 0
    device = _own_device(str(device), local_rank)
    if launch is None or launch.world_size == 1:
        return Distributed(device)
    rank, world_size = launch.rank, launch.world_size
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=launch.host,
        MASTER_PORT=str(launch.port),
    )
    where = f"rank {rank} of {world_size} at {launch.host}:{launch.port}"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=join_s)))
        store = _fresh_namespace(store, rank, world_size, join_s)
        watchdog = Watchdog(store.clone(), rank, world_size, silence_s)
        watchdog.start()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
        )
    except (RuntimeError, TimeoutError) as error:
        raise UserError(f"{where} cannot join the other processes: {first_line(error)}") from error
    return Distributed(device, rank, world_size, local_rank, watchdog)


def _own_device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cuda":
        return torch.device(device)
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no GPU here; run with --device cpu")
    count = torch.cuda.device_count()
    # With --gpus-per-task, srun makes only its own GPU visible to each process.
    index = 0 if count == 1 and "SLURM_GPUS_PER_TASK" in os.environ else local_rank
    if index >= count:
        raise UserError(
            f"local rank {local_rank} finds only {count} GPU(s): start at most {count} processes "
            "a node"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _fresh_namespace(store: dist.Store, rank: int, world_size: int, join_s: float) -> dist.Store:
    """A namespace of `store` for this start of the processes only, once all of them have joined.

    torchrun keeps one store for all restarts, and what a dead attempt left there, such as gloo's
    addresses, must not be taken for a living peer's. The restart count cannot distinguish attempts:
    it differs between nodes. So every process publishes a token of its own, and rank 0 answers each
    token with the name of the namespace.
    """
    give_up = time.monotonic() + join_s
    token = secrets.token_hex(8)
    store.set(f"hello/{rank}", token)
    fresh = None
    while True:
        if rank == 0:
            for hello in (f"hello/{peer}" for peer in range(world_size)):
                if store.check([hello]):
                    store.set(f"welcome/{store.get(hello).decode()}", token)
        if fresh is None and store.check([f"welcome/{token}"]):
            fresh = dist.PrefixStore(store.get(f"welcome/{token}").decode(), store)
            fresh.add("joined", 1)
        joined = fresh.add("joined", 0) if fresh else 0
        if joined == world_size:
            return fresh
        if time.monotonic() > give_up:
            raise TimeoutError(
                f"{joined or 1} of {world_size} processes have come after {join_s:.0f} s"
            )
        time.sleep(0.02)


class Watchdog(threading.Thread):
    """Ends this process when a peer has died.

    gloo notices a closed connection at once, but an NCCL kernel whose peer is gone spins until the
    collective's timeout, which must be long. So every rank increments a counter of its own in the
    rendezvous store and watches those of the others: one that stands still belongs to a process
    that has ended or lost its network.
    """

    # Checks in `silence_s`; counting checks, not seconds, tolerates a job suspended as a whole.
    LOOKS = 8

    def __init__(self, store: dist.Store, rank: int, world_size: int, silence_s: float):
        super().__init__(name="watchdog", daemon=True)
        self._store, self._rank, self._silence_s = store, rank, silence_s
        self._peers = [peer for peer in range(world_size) if peer != rank]
        self._ended = threading.Event()
        store.set_timeout(timedelta(seconds=silence_s))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        last = dict.fromkeys(self._peers, -1)
        unchanged = dict.fromkeys(self._peers, 0)
        while not self._ended.wait(self._silence_s / self.LOOKS):
            try:
                self._store.add(f"alive/{self._rank}", 1)
                counts = {peer: self._store.add(f"alive/{peer}", 0) for peer in self._peers}
            except RuntimeError:
                # After an orderly end the store may disappear just before this rank leaves its last
                # barrier.
                if not self._ended.wait(self._silence_s / self.LOOKS):
                    self._end("the process that holds the rendezvous")
                return
            for peer in self._peers:
                unchanged[peer] = unchanged[peer] + 1 if counts[peer] == last[peer] else 0
            last = counts
            silent = [str(peer) for peer in self._peers if unchanged[peer] >= self.LOOKS]
            if silent:
                self._end(f"rank {', '.join(silent)}")

    def _end(self, who: str) -> None:
        print(
            f"error (rank {self._rank}): {_lost(f'{who} has ended or does not answer')}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def peer_failure(error: BaseException) -> str | None:
    """One line if `error` is how the backends report a lost process, else None."""
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/" in str(error)
    ):
        return _lost("another process has ended or does not answer")
    return None


def _lost(what: str) -> str:
    return f"{what}; this process ends too, and --resume auto continues from the last save"
