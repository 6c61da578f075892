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


def check_patches(img_size: Size, patch_size: Size, stride: Size) -> None:
    """Raise ValueError if a side is smaller than a patch, or leaves pixels that no patch covers."""
    for side, patch, step in zip(*map(to_2tuple, (img_size, patch_size, stride)), strict=True):
        if side < patch:
            raise ValueError(f"image size {side} is smaller than the patch size {patch}")
        rest = (side - patch) % step
        if rest:
            raise ValueError(
                f"image size {side} leaves {rest} pixels that no patch of {patch} at stride {step} "
                f"sees; {side - rest} and {side - rest + step} fit"
            )


class PatchEmbed(nn.Module):
    """Images [B, 3, H, W] to patch embeddings [B, M, d] in raster order.

    Patches overlap if the stride is smaller than they are. Sizes are one number or (height, width).
    """

    def __init__(
        self, img_size: Size, patch_size: Size, stride: Size, in_chans: int, embed_dim: int
    ):
        super().__init__()
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.stride = to_2tuple(stride)
        sides = zip(self.img_size, self.patch_size, self.stride, strict=True)
        self.grid = tuple((side - patch) // step + 1 for side, patch, step in sides)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.img_size:
            (height, width), (own_height, own_width) = images.shape[-2:], self.img_size
            raise ValueError(
                f"images are {height} x {width}, the model takes {own_height} x {own_width}"
            )
        return self.proj(images).flatten(2).transpose(1, 2)
