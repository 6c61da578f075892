"""Images and clips to patch embeddings, and the checks of their sizes.

B images or clips, M patches, d width; T frames, H, W pixels; S slots of t frames each.
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


def check_frames(num_frames: int, tubelet_size: int) -> None:
    """Raise ValueError unless the frames are whole slots of `tubelet_size` frames."""
    rest = num_frames % tubelet_size
    if rest:
        low = num_frames - rest
        fitting = f"{low} and {low + tubelet_size} fit" if low else f"{tubelet_size} fits"
        raise ValueError(
            f"num_frames {num_frames} is not divided by tubelet_size {tubelet_size}; {fitting}"
        )


class PatchEmbed(nn.Module):
    """Images [B, 3, H, W] to patch embeddings [B, M, d] in raster order.

    Patches overlap if the stride is smaller than they are. Sizes are one number or (height, width).
    `grid` is that of all patches, `plane` that of an image, or of one of the `slots` of a clip.
    """

    slots = 1

    def __init__(
        self, img_size: Size, patch_size: Size, stride: Size, in_chans: int, embed_dim: int
    ):
        super().__init__()
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.stride = to_2tuple(stride)
        sides = zip(self.img_size, self.patch_size, self.stride, strict=True)
        self.plane = tuple((side - patch) // step + 1 for side, patch, step in sides)
        self.grid: tuple[int, ...] = self.plane
        self.proj = self._projection(in_chans, embed_dim)

    def _projection(self, in_chans: int, embed_dim: int) -> nn.Module:
        return nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride)

    def check(self, images: Tensor) -> None:
        """Raise ValueError for images of another size."""
        if images.shape[-2:] != self.img_size:
            (height, width), (own_height, own_width) = images.shape[-2:], self.img_size
            raise ValueError(
                f"images are {height} x {width}, the model takes {own_height} x {own_width}"
            )

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        return self.proj(images).flatten(2).transpose(1, 2)


class ClipEmbed(PatchEmbed):
    """Clips [B, 3, T, H, W] to patch embeddings [B, M, d]: slot after slot, each in raster order.

    A patch spans `tubelet_size` frames. Source: VideoMamba (arXiv 2403.06977).
    """

    def __init__(self, num_frames: int, tubelet_size: int, *sizes):
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        super().__init__(*sizes)
        if self.patch_size != self.stride:
            raise ValueError("patches of clips do not overlap; give no stride")
        self.slots = num_frames // tubelet_size
        self.grid = (self.slots, *self.plane)

    def _projection(self, in_chans: int, embed_dim: int) -> nn.Module:
        kernel, stride = ((self.tubelet_size, *sides) for sides in (self.patch_size, self.stride))
        return nn.Conv3d(in_chans, embed_dim, kernel, stride)

    def check(self, images: Tensor) -> None:
        """Raise ValueError for clips of another length or size."""
        if images.dim() != 5 or images.shape[2] != self.num_frames:
            raise ValueError(
                f"clips are [B, {self.proj.in_channels}, {self.num_frames}, H, W] for this model, "
                f"not {list(images.shape)}"
            )
        super().check(images)
