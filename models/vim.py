"""Vim (arXiv 2401.09417): one class token in the middle, the two directions halved."""

from .family import Family
from .layouts import MiddleClassToken
from .registry import register

VIM = Family("vim", MiddleClassToken, halve_directions=True)

register(
    VIM,
    {
        "vim_micro": dict(
            img_size=32, patch_size=4, embed_dim=64, depth=8, pruning_layers=(2, 4, 6)
        ),
        "vim_tiny": dict(embed_dim=192, depth=24),
        "vim_small": dict(embed_dim=384, depth=24),
        "vim_base": dict(embed_dim=768, depth=24),
    },
    aliases={"Vim-Tiny": "vim_tiny", "Vim-Small": "vim_small", "Vim-Base": "vim_base"},
)
