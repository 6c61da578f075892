"""Parity of clips with recordings of VideoMamba's release, beyond the forward passes and gradients
of tests/test_golden.py.
"""

import pytest
import torch
from helpers import golden

from models import FAMILIES, VisionMamba
from models.clip_weights import inflate, load_images
from models.weights import TEMPORAL, load_weights, resize_pos_embed, resize_temporal

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
