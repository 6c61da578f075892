"""Pictures say what the model's result says: the right patches are dimmed, at any size, after
resize and crop.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.seeing import planted
from PIL import Image
from timm.layers import to_2tuple

from drawing import pictures
from drawing.pictures import ImageReport, patch_edges, patch_of_pixels
from drawing.strips import MAX_SIDE, class_marks, draw_strip, strip_layout
from loading.transforms import eval_transform, seen_region
from models import FAMILIES, DynamicVisionMamba
from models.embedding import PatchEmbed
from models.layouts import insert

ARGS = SimpleNamespace(eval_crop_ratio=0.875, whole_images=None)


def small(img_size, family="vim", **kwargs):
    torch.manual_seed(0)
    return DynamicVisionMamba(
        FAMILIES[family],
        img_size=img_size,
        patch_size=8,
        embed_dim=16,
        depth=4,
        num_classes=5,
        pruning_layers=(1, 3),
        token_keep=(0.6, 0.3),
        **kwargs,
    ).eval()


def patch_means(images, model):
    """Mean brightness of each patch, 0 ... 1: [B, 3, H, W] normalised -> [B, M]."""
    pixels = torch.from_numpy(pictures.to_pixels(images)).float().mean(dim=-1)[:, None] / 255
    size = model.patch_embed.proj.kernel_size
    return torch.nn.functional.avg_pool2d(pixels, size).flatten(1)


@pytest.mark.parametrize(
    "img_size, size",
    [(64, (150, 100)), (64, (333, 480)), (64, (64, 64)), (32, (90, 50)), (32, (8, 8))],
)
def test_dimmed_patches_are_those_that_were_dropped(img_size, size):
    """The pixels that a strip dims, shown to the model's own preprocessing, fill exactly the
    dropped patches.
    """
    model, image = small(img_size), planted(size)
    transform, region = eval_transform(ARGS, img_size), seen_region(size, ARGS, img_size)
    with torch.no_grad():
        result = model(transform(image)[None])
    kept = [stage[0].numpy() for stage in result.kept]
    report = ImageReport(
        "x", [("a", 1.0)], kept, result.gates[:, 0].numpy(), 1.0, 2.0, model.pruning_layers
    )
    strip = np.asarray(draw_strip(image, region, model, report))
    layout = strip_layout(size)
    enlarged = np.asarray(image).repeat(layout.scale, 0).repeat(layout.scale, 1)
    margin = round(12 * layout.unit)
    places = [
        (margin, margin + i * (layout.width + margin))
        if layout.in_row
        else (margin + i * (layout.height + round(52 * layout.unit)), margin)
        for i in range(3)
    ]
    panels = [strip[y : y + layout.height, x : x + layout.width] for y, x in places]
    assert (panels[0] == enlarged).all()
    outside = (
        patch_of_pixels(
            model.patch_embed,
            (layout.width, layout.height),
            tuple(layout.scale * side for side in region),
        )
        < 0
    )
    for panel, stage in zip(panels[1:], kept, strict=True):
        dimmed = (panel != enlarged).any(axis=-1)
        assert dimmed[outside].all()
        shown = (
            Image.fromarray(np.where(dimmed & ~outside, 255, 0).astype(np.uint8))
            .convert("RGB")
            .resize(size, Image.Resampling.BOX)
        )
        bright = patch_means(transform(shown)[None], model)[0] > 0.5
        assert set(np.flatnonzero(~bright.numpy())) == set(stage.tolist())


@pytest.mark.parametrize("size", [(200, 120), (120, 200), (97, 250), (64, 64)])
@pytest.mark.parametrize(
    "img_size, ratio",
    [
        (64, 0.875),
        (64, 1.0),
        (100, 0.9),
        (32, 0.875),
        ((64, 96), 0.875),
        ((90, 48), 0.9),
        ((64, 64), 0.875),
        ((16, 32), 0.875),
    ],
)
def test_region_is_what_the_preprocessing_shows(size, img_size, ratio):
    """An image whose pixels hold their own coordinates comes out of the preprocessing with those of
    the region.
    """
    args = SimpleNamespace(eval_crop_ratio=ratio, whole_images=None)
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
    left, top, right, bottom = seen_region(size, args, img_size)
    pixels = pictures.to_pixels(eval_transform(args, img_size)(image)[None])[0].astype(float)
    rows, columns = to_2tuple(img_size)
    across, down = (np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows
    inner = slice(4, -4)  # the bicubic filter bends the gradient at the borders of the image
    assert (
        np.abs(pixels[inner, inner, 0] - (left + across * (right - left) - 0.5)[None, inner]).max()
        < 1.5
    )
    assert (
        np.abs(pixels[inner, inner, 1] - (top + down * (bottom - top) - 0.5)[inner, None]).max()
        < 1.5
    )


def test_overlapping_patches_share_the_image_by_their_centres():
    edges = patch_edges(PatchEmbed(32, patch_size=16, stride=8, in_chans=3, embed_dim=4), axis=0)
    assert edges.tolist() == [0, 12, 20, 32]
    patch_of = patch_of_pixels(
        PatchEmbed(36, patch_size=16, stride=8, in_chans=3, embed_dim=4), (36, 36)
    )
    assert (
        patch_of[0, :36].tolist() == [0] * 12 + [1] * 8 + [2] * 12 + [-1] * 4
    )  # no patch reaches the last pixels


@pytest.mark.parametrize(
    "family, registers",
    [("vim", {}), ("videomamba", {}), ("mambareg", dict(num_registers=4, register_reduction=2))],
)
def test_class_marks_stand_where_the_class_tokens_stand_in_the_sequence(family, registers):
    model = small(32, family, **registers)
    kept = np.array([0, 2, 3, 5, 7, 8, 11, 13, 14])
    positions = model.layout.class_slots(len(kept))
    sequence = insert(torch.from_numpy(kept)[None], torch.full((1, len(positions)), -1), positions)[
        0
    ].tolist()
    for mark, position in zip(class_marks(kept, model), positions, strict=True):
        following = [token for token in sequence[position + 1 :] if token >= 0]
        before = [token for token in sequence[:position] if token >= 0]
        assert mark == (following[0] if following else model.num_patches)
        assert all(token < mark for token in before)


def test_a_stage_that_keeps_nothing_and_an_image_smaller_than_the_grid():
    model, image = small(64), planted((3, 3))
    report = ImageReport(
        "tiny", [("a", 0.5)], [np.arange(64), np.array([], dtype=int)], None, 1.0, 2.0, (1, 3)
    )
    assert draw_strip(image, (0, 0, 3, 3), model, report).size > (256, 256)


def test_huge_images_are_reduced():
    model = small(64)
    report = ImageReport("huge", [("a", 0.5)], [np.arange(10)], None, 1.0, 2.0, (1, 3))
    strip = draw_strip(Image.new("RGB", (6000, 1500)), (0, 0, 6000, 1500), model, report)
    assert strip.width < 2 * MAX_SIDE + 1000


def test_the_picture_for_tensorboard_dims_the_same_patches():
    model = small(32)
    images = torch.rand(2, 3, 32, 32) * 0.5 + 1.5  # bright after normalisation is undone
    kept = [torch.tensor([[0, 5], [3, 15]])]
    picture = pictures.decision_picture(images, kept, model.patch_embed)
    assert picture.shape == (2 * 32 + pictures.GAP, 2 * 32 + pictures.GAP, 3)
    for column, chosen in enumerate(kept[0].tolist()):
        x = column * (32 + pictures.GAP)
        same = (picture[:32, x : x + 32] == picture[32 + pictures.GAP :, x : x + 32]).all(axis=-1)
        assert set(np.unique(patch_of_pixels(model.patch_embed, (32, 32))[same])) == set(chosen)


def test_rows_are_named_beside_the_picture():
    images, kept = torch.zeros(3, 3, 32, 32), [torch.zeros(3, 5, dtype=torch.long)]
    picture = pictures.decision_picture(images, kept, small(32).patch_embed)
    named = pictures.with_row_names(picture, ["input", "stage 1:\n31 % kept"])
    height, width = picture.shape[:2]
    margin = named.shape[1] - width
    assert margin > 60 and named.shape[0] == height
    assert np.array_equal(named[:, margin:], picture)
    written = (named[:, :margin] < 128).any(axis=(1, 2))
    # one line in the upper half, two in the lower one
    lines = [np.diff(half.astype(int)).clip(0).sum() for half in np.split(written, 2)]
    assert lines == [1, 2]
