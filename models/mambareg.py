"""MambaReg (arXiv 2405.14858): registers spread evenly among the patches, all read by the head."""

from .family import Family
from .layouts import SpreadRegisters
from .registry import register

MAMBAREG = Family("mambareg", SpreadRegisters, halve_directions=True, registers=True)

register(
    MAMBAREG,
    {
        "mambareg_tiny": dict(embed_dim=192, depth=24, num_registers=12, register_reduction=1),
        "mambareg_small": dict(embed_dim=384, depth=24, num_registers=12, register_reduction=2),
        "mambareg_base": dict(embed_dim=768, depth=24, num_registers=12, register_reduction=4),
        "mambareg_large": dict(embed_dim=1024, depth=48, num_registers=16, register_reduction=8),
    },
    aliases={
        "MambaReg-Tiny": "mambareg_tiny",
        "MambaReg-Small": "mambareg_small",
        "MambaReg-Base": "mambareg_base",
        "MambaReg-Large": "mambareg_large",
    },
)
