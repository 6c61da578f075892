"""Parity of clips with recordings of VideoMamba's release, beyond the forward passes and gradients
of tests/test_golden.py.
"""

import pytest
import torch
from helpers import golden

from loading.frames import (
    Dense,
    Parts,
    Uniform,
    centre,
    crop_starts,
    frames_of_part,
    parts_of,
    short_side,
)
from loading.loaders import Batch
from models import FAMILIES, Result, VisionMamba
from models.clip_weights import inflate, load_images
from models.weights import TEMPORAL, load_weights, resize_pos_embed, resize_temporal
from tasks.video import VideoMeter, _mean
from utils.distributed import Distributed

pytestmark = pytest.mark.skipif(
    not golden.GOLDEN_DIR.is_dir(), reason=f"no recorded cases at {golden.GOLDEN_DIR}"
)


@pytest.mark.parametrize("name", golden.names("video_inflate"))
def test_a_start_from_an_image_model(name):
    case = golden.load(name)
    weights = case.group("in.")
    for info, recorded in golden.subcases(case):
        tubelet_size, centre = info["tubelet_size"], info["center"]
        config = {**case.info["config"], **info}
        model = golden.build({"config": config, "family": "videomamba"}, dynamic=False)
        fresh = {key: value.clone() for key, value in model.state_dict().items()}
        load_images(model, {"model": weights}, name, centre)
        for key, value in model.state_dict().items():
            if key in recorded:
                assert torch.equal(value, recorded[key]), (info["name"], key)
            elif key in info["fresh"]:
                assert torch.equal(value, fresh[key]), (info["name"], key)
            else:
                assert torch.equal(value, weights[key]), (info["name"], key)
        inflated = inflate(weights["patch_embed.proj.weight"], tubelet_size, centre)
        torch.testing.assert_close(inflated.sum(2), weights["patch_embed.proj.weight"])


@pytest.mark.parametrize("name", golden.names("video_pos_temporal"))
def test_position_tables(name):
    """The tables alone, and as a model of other clips loads them."""
    for info, t in golden.subcases(golden.load(name)):
        temporal, spatial = t[f"in.{TEMPORAL}"], t["in.pos_embed"]
        grid = (info["grid_to"],) * 2
        golden.close(
            resize_temporal(temporal, info["slots_to"]), t[f"out.{TEMPORAL}"], 1e-5, 0, name
        )
        golden.close(resize_pos_embed(spatial, grid, 0, 0), t["out.pos_embed"], 1e-5, 0, name)
        before, after = (
            VisionMamba(
                FAMILIES["videomamba"],
                img_size=4 * side,
                patch_size=4,
                num_frames=info[frames],
                tubelet_size=info["tubelet_size"],
                embed_dim=info["dim"],
                depth=1,
                num_classes=2,
            )
            for side, frames in (
                (info["grid_from"], "orig_num_frames"),
                (info["grid_to"], "num_frames"),
            )
        )
        state = before.state_dict() | {TEMPORAL: temporal, "pos_embed": spatial}
        load_weights(after, {"model": state}, name)
        golden.close(after.temporal_pos_embedding, t[f"out.{TEMPORAL}"], 1e-5, 0, name)
        golden.close(after.pos_embed, t["out.pos_embed"], 1e-5, 0, name)


def lowest(low: int, high: int) -> int:
    return low


def highest(low: int, high: int) -> int:
    return high


def views(sampling, frames: int, count: int, number: int) -> list[list[int]]:
    return [sampling.view(frames, count, view, number) for view in range(number)]


def check_sampling(entry: dict) -> None:
    n, count = entry["video_frames"], entry["num_frames"]
    samplings = {
        "uniform": Uniform(),
        "dense.rate4": Dense(4),
        "dense.rate2": Dense(2),
        "tsn_video": Parts(),
        "tsn_frames": Parts(folders=True),
    }
    for key, recorded in entry.items():
        name, _, rest = key.partition(".t" if ".t" in key else ".v")
        if name not in samplings:
            assert key in ("video_frames", "num_frames"), f"{key} is not compared"
            continue
        sampling, what = samplings[name], (key, n, count)
        if rest.startswith("est.segments"):
            assert views(sampling, n, count, len(recorded)) == recorded, what
        elif rest == "alidation" and name.startswith("dense") and n > count * sampling.rate:
            # The release takes the wanted start for the end; numbers below 0 it rounds up.
            later = [index + count * sampling.rate for index in recorded]
            ours = sampling.middle(n, count)
            pairs = zip(ours, later, recorded, strict=True)
            assert all(abs(a - b) <= (c <= 0) for a, b, c in pairs), what
        elif rest == "alidation":
            assert sampling.middle(n, count) == recorded, what
        elif rest == "rain.bounds":
            ends = (sampling.train(n, count, draw) for draw in (lowest, highest))
            assert [list(pair) for pair in zip(*ends, strict=True)] == recorded, what
        elif "end_from" in recorded:
            first, last = (sampling.train(n, count, draw) for draw in (lowest, highest))
            assert first == recorded["indexes_at_first_end"], what
            shift = recorded["end_below"] - 1 - recorded["end_from"]
            assert last[0] == first[0] + shift and last[-1] == first[-1] + shift, what
        elif "part_length" in recorded:
            first, last = (sampling.train(n, count, draw) for draw in (lowest, highest))
            assert first == recorded["starts"], what
            assert last == [start + recorded["part_length"] - 1 for start in first], what
        elif recorded.get("kind") == "first frame repeated":  # ours shows all frames that there are
            ours = sampling.train(n, count, lowest)
            assert ours == [0] * (count - n) + list(range(n)), what
        else:
            assert sampling.train(n, count, lowest) == recorded["indexes"], what


@pytest.mark.parametrize("name", golden.names("video_views"))
def test_merged_views(name):
    """Segments and crops of each video, merged."""
    case = golden.load(name)
    views, labels = case.tensors["in.logits"].flatten(1, 2), case.tensors["in.labels"]
    gates, nothing = torch.ones(1, len(views), 2), torch.zeros(0)
    merged = _mean([Result(view, nothing, nothing, nothing, gates) for view in views.unbind(1)])
    golden.close(merged.logits.exp(), case.tensors["out.scores"], 1e-6, 1e-5, name)
    assert torch.equal(merged.logits.argmax(-1), case.tensors["out.prediction"])
    cpu = torch.device("cpu")
    meter = VideoMeter(cpu, slots=1)
    meter.update(Batch(torch.zeros(len(views), 1), labels, torch.arange(len(views))), merged)
    values = meter.compute(Distributed(cpu))
    assert values["top1"] == pytest.approx(case.info["top1_percent"])
    assert values["top5"] == pytest.approx(case.info["top5_percent"])


@pytest.mark.parametrize("name", golden.names("video_sampling"))
def test_frames_and_crops(name):
    info = golden.load(name).info
    for entry in info["entries"]:
        check_sampling(entry)
    for entry in info["crops"]:
        size = entry["height"], entry["width"], entry["crop_size"]
        if isinstance(entry["crops"], int):
            starts = crop_starts(*size, entry["crops"])
        else:
            starts = [centre(*size)]
        assert [list(start) for start in starts] == entry["top_left"], entry
    for entry in info["resize"]:
        size = short_side(entry["height"], entry["width"], entry["short_side"])
        assert list(size) == entry["to"], entry
    for entry in info["trimmed"]:
        parts = parts_of(entry["duration"], entry["trimmed"], entry["time_stride"])
        assert [list(part) for part in parts] == [
            [part["start"], part["end"]] for part in entry["parts"]
        ], entry
        for part, recorded in zip(parts, entry["parts"], strict=True):
            frames = frames_of_part(*part, entry["frames_per_second"], entry["video_frames"])
            chosen = views(Uniform(), len(frames), entry["num_frames"], 2)
            assert [[frames[index] for index in view] for view in chosen] == recorded[
                "test.segments2"
            ], part
