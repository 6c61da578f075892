"""Tables for a reader."""

import pytest

from evaluation import summary
from evaluation.summary import table
from tasks import task_named
from utils.tables import text_table


@pytest.mark.parametrize(
    "rows, headers",
    [
        ([["a", "1.0", "x"], ["bbbbbb", "22.22", ""]], ["", "ms", "a longer head"]),
        ([["", "3"]], ["", "n"]),
        ([["a", "12345678"]], ["a longer head", "ms"]),
    ],
)
def test_the_simple_form_is_tabulates(rows, headers):
    tabulate = pytest.importorskip("tabulate").tabulate
    aligned = ("left", *["right"] * (len(headers) - 1))
    expected = tabulate(rows, headers, disable_numparse=True, colalign=aligned)
    assert text_table(rows, headers) == expected


def column(**more) -> dict:
    flops = {"paper": 2e6, "exact": 3e6}
    return {"flops": flops, "images_per_s": None, "parameters": 5, **more}


def report(task: str, **models) -> list[str]:
    """The lines of a table, without what aligns them."""
    about = {"model": "m", "data_set": "D", "images": 7, "backend": "cpu", "device": "cpu"}
    about |= {"precision": "float32", "batch_size": 4, "dense": None, "dynamic": None}
    text = table(about | models, task_named(task))
    return [" ".join(line.split()) for line in text.splitlines()]


def test_an_evaluation_shows_what_was_measured():
    dense = column(top1=50.0, top5=75.0, loss=1.5)
    assert report("classification", dense=dense) == [
        "m on D, 7 images; backend cpu, cpu, float32",
        "dense",
        "------------- -------",
        "top-1, % 50.00",
        "top-5, % 75.00",
        "loss 1.5000",
        "MFLOPs, paper 2.00",
        "MFLOPs, exact 3.00",
        "parameters 5",
    ]
    dynamic = dense | {"ema_top1": 40.0, "images_per_s": 8.0, "keep": [], "gates": [[1.0, 1.0]]}
    lines = report("video", dense=column(), dynamic=dynamic)
    assert lines[:2] == ["m on D, 7 videos; backend cpu, cpu, float32", "dense dynamic change"]
    assert lines[3:5] == ["top-1, % - 50.00", "top-1 of the EMA, % - 40.00"]
    assert "videos/s, batch of 4 - 8.0" in lines and "parameters 5 5" in lines


@pytest.mark.parametrize(
    "earlier, told",
    [
        (None, False),
        ("no JSON", False),
        ("[]", False),
        ('{"checkpoint_sha256": "a"}', False),
        ('{"checkpoint_sha256": "b"}', True),
    ],
)
def test_the_evaluation_of_another_checkpoint_is_not_replaced_in_silence(
    tmp_path, caplog, earlier, told
):
    path = tmp_path / "eval.json"
    if earlier is not None:
        path.write_text(earlier)
    with caplog.at_level("INFO"):
        summary._tell_of_replaced(path, "a")
    assert caplog.messages == [f"{path} is of another checkpoint, and will be replaced"] * told
