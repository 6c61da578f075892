"""Clips as pictures: rows of frames, patches kept of each frame, and clips in motion."""

import numpy as np
import pytest
import torch
from PIL import Image

from drawing import plots
from drawing.animation import animate, save_animation
from drawing.groups import dim_dropped
from drawing.pictures import ImageReport, filmstrip, patch_of_pixels
from drawing.strips import per_slot
from models import FAMILIES, DynamicVisionMamba


def small(frames: int, tubelet: int = 1) -> DynamicVisionMamba:
    torch.manual_seed(0)
    return DynamicVisionMamba(
        FAMILIES["videomamba"], img_size=16, patch_size=8, embed_dim=16, depth=2, num_classes=2,
        num_frames=frames, tubelet_size=tubelet, pruning_layers=(1,), token_keep=(0.5,),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("frames, rows, columns", [(4, 1, 4), (8, 1, 8), (11, 2, 8)])
def test_frames_stand_in_rows_of_eight(frames, rows, columns):
    patches = small(frames).patch_embed
    numbers = torch.arange(frames).float()[None, None, :, None, None]
    clip = numbers.expand(1, 3, -1, 16, 16)
    strip = filmstrip(clip, patches)[0, 0]
    assert strip.shape == (16 * rows, 16 * columns)
    owners = patch_of_pixels(patches, (16 * columns, 16 * rows))
    for slot in range(frames):
        y, x = 16 * (slot // 8), 16 * (slot % 8)
        assert (strip[y : y + 16, x : x + 16] == slot).all()
        cell = owners[y : y + 16, x : x + 16]
        assert cell[0, 0] == 4 * slot and cell[15, 15] == 4 * slot + 3
        assert np.unique(cell).tolist() == list(range(4 * slot, 4 * slot + 4))
    assert (owners == -1).sum() == 256 * (rows * columns - frames), "empty places show no patch"


def test_the_middle_frame_of_a_tubelet_is_shown():
    clip = torch.arange(6.0)[None, None, :, None, None].expand(1, 3, -1, 16, 16)
    assert filmstrip(clip, small(6, tubelet=3).patch_embed)[0, 0, 0, ::16].tolist() == [1, 4]


def report(model, clip) -> ImageReport:
    with torch.no_grad():
        result = model(clip[None])
    kept = [stage[0].numpy() for stage in result.kept]
    return ImageReport("clip.mp4", [("left", 0.9)], kept, None, 1e6, 2e6, model.pruning_layers)


def test_a_clip_in_motion(tmp_path):
    model = small(6, tubelet=2)
    clip = torch.randn(3, 6, 16, 16)
    told = report(model, clip)
    pictures = animate(clip, model, told)
    assert len(pictures) == 6 and len({picture.size for picture in pictures}) == 1
    assert len({picture.tobytes() for picture in pictures}) == 6
    save_animation(pictures, tmp_path / "clip.gif")
    with Image.open(tmp_path / "clip.gif") as saved:
        assert saved.n_frames == 6 and saved.size == pictures[0].size and saved.info["loop"] == 0
        assert saved.info["duration"] >= 100
    counts = per_slot(told.kept[0], model.patch_embed)
    assert counts.sum() == len(told.kept[0]) == 6 and len(counts) == 3


def test_a_frame_in_motion_dims_what_its_own_slot_dropped():
    """The second panel of frame 3, of slot 1, as the strip shows it."""
    model = small(6, tubelet=2)
    clip = torch.randn(3, 6, 16, 16).clamp(-1, 1)
    told = report(model, clip)
    shown = np.asarray(animate(clip, model, told)[3])
    scale, margin, title = 10, 12, 24
    panel = shown[margin + title :, 2 * margin + 16 * scale :][: 16 * scale : scale, :160:scale]
    patches = model.patch_embed
    strip = filmstrip(clip[None], patches)
    owners = patch_of_pixels(patches, (strip.shape[-1], 16))
    from drawing.pictures import to_pixels

    expected = dim_dropped(to_pixels(strip)[0], owners, told.kept[0])[:, 16:32]
    assert np.array_equal(panel, expected), "slot 1's middle frame is frame 3"


def test_large_frames_are_reduced():
    torch.manual_seed(0)
    model = DynamicVisionMamba(
        FAMILIES["videomamba"], img_size=(224, 448), patch_size=16, embed_dim=16, depth=2,
        num_classes=2, num_frames=2, tubelet_size=1, pruning_layers=(1,), token_keep=(0.5,),
    ).eval()  # fmt: skip
    clip = torch.randn(3, 2, 224, 448)
    [first, _] = animate(clip, model, report(model, clip))
    assert first.size[0] == 2 * 160 + 3 * 12


def test_the_plots_take_many_frames():
    keep = np.random.default_rng(0).random((3, 64 * 4))
    figure = plots.keep_maps(keep, (64, 2, 2))
    assert len(figure.axes) == 3 * 16 and "5:" in figure.axes[1].get_title()
    [axes] = plots.kept_per_frame(keep, 64).axes
    for stage, line in enumerate(axes.lines):
        expected = 100 * keep[stage].reshape(64, 4).mean(axis=1)
        assert np.allclose(line.get_ydata(), expected) and line.get_xdata()[-1] == 64
