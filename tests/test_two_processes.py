"""Two processes on a CPU: both act alike when one meets a bad number, dies or is told to leave, and
the run goes on.
"""

import json
import os
import signal
import time

import pytest
import torch
from helpers.exports import decided
from helpers.processes import ROOT, finish, launch, start, torchrun, wait_until
from helpers.seeing import DYNAMIC, save_model

import main
from tests.helpers.flags import tiny
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

DISTURBED = ROOT / "tests" / "helpers" / "disturbed_training.py"
SMALL = tiny("--throughput-seconds", "0", depth=2, batch_size=8)
OFTEN = ["--save-minutes", "1e-6"]

EVALUATE = """
import json, torch, options
from pathlib import Path
from models.build import ModelSpec, build_model
from datasets import build_data
from engine import validate
from loading.data import assemble
from tasks import CLASSIFICATION, Experiment
from loading.images import SubsetImages
from loading.options import DataOptions
from loading.transforms import classification_transforms
from utils.distributed import init_distributed

distributed = init_distributed("cpu")
flags = "--model-kwargs embed_dim=16 depth=2 --input-size 16 --num-workers 0"
args = options.parse(flags.split())
torch.manual_seed(0)
model, data = build_model(ModelSpec.from_args(args), 10), build_data(args, 16, train=False)
for count in (1, 7, 359, 360):
    val = SubsetImages(data.val, torch.arange(count).numpy())
    given = DataOptions.from_args(args, distributed.rank, distributed.world_size)
    part = assemble(given, classification_transforms(args, 16), None, val)
    values = validate(model, Experiment(args, CLASSIFICATION, part, distributed, Path()))
    print("metrics", json.dumps([values[key] for key in ("images", "top1", "top5", "loss")]))
distributed.shutdown()
"""

WRONG = """
import os, time
from utils.errors import UsageError
from utils.program import run_main

def main():
    time.sleep(1 if os.environ["RANK"] == "0" else 0)
    if os.environ["RANK"] in "RANKS":
        raise UsageError("wrong")
    time.sleep(60)

run_main(main)
"""


def one_line(stderr: str, *words: str) -> None:
    lines = [line for line in stderr.splitlines() if line]
    assert len(lines) == 1 and all(word in lines[0] for word in words), stderr


def test_evaluation_equals_that_of_one_process():
    one, two = (
        [
            line
            for line in launch(processes, ["-c", EVALUATE])[0].splitlines()
            if line.startswith("metrics")
        ]
        for processes in (1, 2)
    )
    assert [json.loads(line.removeprefix("metrics"))[0] for line in one] == [1, 7, 359, 360]
    assert one == two


@pytest.mark.parametrize("images, batch", [(2, 1), (77, 8)])
def test_thresholds_of_tokens_are_those_of_one_process(tmp_path, images, batch):
    path = decided(save_model(tmp_path / "model.pth", *DYNAMIC))
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        words = ["main.py", "--eval", "--token-budget", "image", "--subset", images]
        words += ["--throughput-seconds", "0", "--model-path", path, "--output_dir", output]
        words += ["--num-workers", "0", "--device", "cpu", "--batch-size", batch]
        launch(processes, words)
        report = json.loads((output / "eval.json").read_text())
        found.append(report["dynamic"] | {"images": report["images"]})
    assert found[0]["token_budget"]["thresholds"] and found[0] == found[1]


def test_both_leave_out_the_step_of_a_bad_number_on_one(tmp_path):
    flags = [*SMALL, "--mixup", "0", "--cutmix", "0", "--output_dir", str(tmp_path)]
    outputs = launch(2, [DISTURBED, "nan=1:2", "hash=1", "--", *flags])
    hashes = {
        line for output in outputs for line in output.splitlines() if line.startswith("weights")
    }
    assert len(hashes) == 1
    log = json.loads((tmp_path / "log.txt").read_text())
    assert log["train_skipped_steps"] == 1 and log["train_loss"] > 0
    told = [
        line for line in outputs[0].splitlines() if "step left out: the loss is not finite" in line
    ]
    assert len(told) == 1 and told[0].count("DIGITS train image") == 8, (
        "the images of the rank that had it"
    )


def test_a_bad_number_on_one_stops_both_when_asked_to(tmp_path):
    flags = [
        *SMALL,
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--nonfinite",
        "stop",
        "--output_dir",
        str(tmp_path),
    ]
    ends = finish(start(2, [DISTURBED, "nan=1:2", "--", *flags]))
    assert [code for code, _, _ in ends] == [1, 1]
    one_line(
        ends[0][2], "error (rank 0)", "the loss is not finite on the batch of", "nonfinite.pth"
    )
    one_line(ends[1][2], "error (rank 1)")
    saved = load_checkpoint(tmp_path / "nonfinite.pth")
    assert (saved["epoch"], saved["step"], len(saved["images"])) == (0, 2, 2)
    assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize("flags", [["--epochs", "no"], ["--device", "cuda"]], ids=" ".join)
def test_a_mistake_in_the_flags_ends_all(flags):
    """Before the processes have met."""
    ends = finish(start(2, ["main.py", *flags]))
    assert [code for code, _, _ in ends] == [2, 2]
    for rank, (_, _, stderr) in enumerate(ends):
        one_line(stderr, f"error (rank {rank})", flags[0])


@pytest.mark.parametrize(
    "ranks, line", [("01", "error (rank 0): wrong"), ("1", "error (rank 1): wrong")]
)
def test_under_torchrun_a_mistake_in_the_flags_is_told_once(tmp_path, ranks, line):
    """It ends the other process as soon as one has ended; the first may be the slower to tell."""
    script = tmp_path / "script.py"
    script.write_text(WRONG.replace("RANKS", ranks))
    run = torchrun(script)
    told = "".join(run.communicate(timeout=120)).splitlines()
    assert run.returncode != 0
    assert [each for each in told if each.startswith("error")] == [line]


@pytest.fixture(scope="module")
def survivor(tmp_path_factory):
    """A training in whose middle rank 1 was killed -> output folder, flags, seconds until rank 0
    ended, its end.
    """
    output, pids = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("pids")
    flags = [*SMALL, *OFTEN, "--subset", "256", "--output_dir", str(output)]
    children = start(2, [DISTURBED, "slow=0.3", f"pids={pids}", "--", *flags])
    try:
        wait_until(lambda: (output / "checkpoint_prev.pth").exists())
        children[1].kill()
        begin = time.monotonic()
        end = children[0].wait(timeout=60)
    finally:
        ends = finish(children)
    return output, flags, time.monotonic() - begin, (end, ends[0][2])


def test_a_killed_rank_ends_the_other(survivor):
    _, _, seconds, (code, stderr) = survivor
    assert seconds < 60 and code == 1
    one_line(stderr, "error (rank 0)", "--resume auto continues from the last save")


def test_both_end_if_the_folder_holds_a_run(survivor):
    output, flags, _, _ = survivor
    before = (output / "checkpoint.pth").read_bytes()
    ends = finish(start(2, ["main.py", *flags]))
    assert [code for code, _, _ in ends] == [2, 2]
    for rank, (_, _, stderr) in enumerate(ends):
        one_line(stderr, f"error (rank {rank})", f"{output} already holds", "--resume auto")
    assert (output / "checkpoint.pth").read_bytes() == before


def test_another_number_of_processes_is_refused_or_begins_the_epoch_again(survivor, capsys):
    output, flags, _, _ = survivor
    assert load_checkpoint(output / "checkpoint.pth")["step"] > 0
    with pytest.raises(UserError, match=r"number of processes: 2 -> 1.*--resume-override"):
        main.main([*flags, "--resume", "auto"])
    assert main.main([*flags, "--resume", "auto", "--resume-override"]) == 0
    assert "at epoch 1, step 0" in capsys.readouterr().out
    assert load_checkpoint(output / "checkpoint.pth")["epoch"] == 1


def test_torchrun_preempted_or_restarted_ends_with_the_same_weights(tmp_path):
    """SIGTERM to torchrun, then again with --resume auto; and a worker killed under --max-restarts
    1.
    """
    flags = [*SMALL, *OFTEN, "--subset", "256", "--resume", "auto"]
    told, killed, pids = (tmp_path / name for name in ("told", "killed", "pids"))
    pids.mkdir()
    run = torchrun(DISTURBED, "slow=0.2", "--", *flags, "--output_dir", told)
    try:
        wait_until(lambda: (told / "checkpoint_prev.pth").exists())
        begin = time.monotonic()
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=60) != 0 and time.monotonic() - begin < 30
    finally:
        run.kill()
    assert "told to leave by SIGTERM; saved" in "".join(run.communicate(timeout=60))
    step = load_checkpoint(told / "checkpoint.pth")["step"]
    assert 0 < step < 16
    first, _ = launch(2, ["main.py", *flags, "--output_dir", told])
    assert f"at epoch 1, step {step}" in first

    disturbances = ["slow=0.2", f"pids={pids}"]
    run = torchrun(
        "--max-restarts", "1", DISTURBED, *disturbances, "--", *flags, "--output_dir", killed
    )
    try:
        wait_until(lambda: (killed / "checkpoint_prev.pth").exists())
        os.kill(int((pids / "1").read_text()), signal.SIGKILL)
        assert run.wait(timeout=180) == 0
    finally:
        run.kill()
    assert "resumed from" in "".join(run.communicate(timeout=60))
    states = [load_checkpoint(folder / "checkpoint.pth") for folder in (told, killed)]
    assert all(
        torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items()
    )
    assert (told / "log.txt").read_bytes() == (killed / "log.txt").read_bytes()
