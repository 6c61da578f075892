"""Images to patch embeddings, and the checks of their sizes.

B images, M patches, d width; H, W pixels; h, w the grid of patches.
"""

from collections.abc import Sequence

from timm.layers import to_2tuple
from torch import Tensor, nn

Size = int | Sequence[int]  # of one side, or height and width


def check_positive(**sizes) -> None:
    """Raise ValueError unless every size is a positive integer, or a pair of them."""
    for name, size in sizes.items():
        sides = size if isinstance(size, Sequence) and not isinstance(size, str) else (size,)
        if len(sides) > 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise ValueError(f"{name} must be a positive integer, not {size!r}")


def grid_of(img_size: Size, patch_size: Size, stride: Size) -> tuple[int, int]:
    """Patches (h, w) of an image.

    Raises ValueError when a side is smaller than a patch, or leaves pixels that no patch sees.
    """
    sides = zip(to_2tuple(img_size), to_2tuple(patch_size), to_2tuple(stride), strict=True)
    return tuple(_patches_along(*side) for side in sides)


def _patches_along(side: int, patch: int, stride: int) -> int:
    if side < patch:
        raise ValueError(f"image size {side} is smaller than the patch size {patch}")
    rest = (side - patch) % stride
    if rest:
        raise ValueError(
            f"image size {side} leaves {rest} pixels that no patch of {patch} at stride {stride} "
            f"sees; {side - rest} and {side - rest + stride} fit"
        )
    return (side - patch) // stride + 1


class PatchEmbed(nn.Module):
    """Images [B, 3, H, W] to patch embeddings [B, M, d] in raster order; patches overlap where the
    stride is smaller than they are. Sizes are one number or (height, width).
    """

    def __init__(
        self, img_size: Size, patch_size: Size, stride: Size, in_chans: int, embed_dim: int
    ):
        super().__init__()
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.stride = to_2tuple(stride)
        self.grid = grid_of(img_size, patch_size, stride)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.img_size:
            (height, width), (own_height, own_width) = images.shape[-2:], self.img_size
            raise ValueError(
                f"images are {height} x {width}, the model takes {own_height} x {own_width}"
            )
        return self.proj(images).flatten(2).transpose(1, 2)
