"""VideoMamba, images and clips (arXiv 2403.06977): class token in front, directions not halved."""

from .family import Family
from .layouts import HeadClassToken
from .registry import register

VIDEOMAMBA = Family("videomamba", HeadClassToken, halve_directions=False, clips=True)

register(
    VIDEOMAMBA,
    {
        "videomamba_micro": dict(img_size=48, embed_dim=96, depth=4, pruning_layers=(1, 2, 3)),
        "videomamba_tiny": dict(embed_dim=192, depth=24),
        "videomamba_small": dict(embed_dim=384, depth=24),
        "videomamba_middle": dict(embed_dim=576, depth=32),
        "videomamba_base": dict(embed_dim=768, depth=24),
    },
    aliases={
        "VideoMamba-Tiny": "videomamba_tiny",
        "VideoMamba-Small": "videomamba_small",
        "VideoMamba-Middle": "videomamba_middle",
        "VideoMamba-Base": "videomamba_base",
    },
)
