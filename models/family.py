"""What differs between the families of backbones: class tokens, scan directions, kinds of input."""

from dataclasses import dataclass

from .embedding import check_frames
from .layouts import NoClassToken, TokenLayout


@dataclass(frozen=True)
class Family:
    """What differs between the families of backbones.

    Args:
        layout: builds the rule for the class tokens from their number.
        clips: models of clips exist.
        registers: several class tokens with a position embedding of their own, all read by the
            head; without, one table holds the rows of the patches and of the class token, in the
            order of the sequence.
    """

    name: str
    layout: type[TokenLayout]
    halve_directions: bool
    registers: bool = False
    clips: bool = False

    def make_layout(self, num_registers: int, class_token: bool) -> TokenLayout:
        if not class_token:
            return NoClassToken()
        return self.layout(num_registers) if self.registers else self.layout()

    def check_registers(
        self, class_token: bool, num_registers: int, register_reduction: int, embed_dim: int
    ) -> None:
        """Raise ValueError for registers in a family without them, and for numbers of them that do
        not fit.
        """
        if not self.registers and (num_registers, register_reduction) != (1, 1):
            raise ValueError(
                f"{self.name} has one class token; num_registers and register_reduction are "
                "MambaReg's"
            )
        if self.registers and not class_token:
            raise ValueError("class_token=False: MambaReg's head reads its registers")
        counts = num_registers, embed_dim
        if register_reduction < 1 or any(count % register_reduction for count in counts):
            raise ValueError(
                f"register_reduction {register_reduction} must divide num_registers "
                f"{num_registers} and embed_dim {embed_dim}"
            )

    def check_clips(self, class_token: bool, num_frames: int | None, tubelet_size: int) -> None:
        """Raise ValueError for clips in a family without them, and for frames that do not fit."""
        if num_frames is None:
            if tubelet_size != 1:
                raise ValueError("tubelet_size is for clips: give num_frames too")
            return
        if not self.clips or not class_token:
            raise ValueError("num_frames is for videomamba models with their class token")
        check_frames(num_frames, tubelet_size)
