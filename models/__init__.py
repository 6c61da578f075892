"""Vision Mamba backbones, dense and dynamic. Importing this package registers them in timm."""

from . import mambareg, videomamba, vim
from .backbone import VisionMamba
from .dynamic import DynamicVisionMamba
from .family import Family
from .reduction import cumulative_keep
from .registry import canonical_name, model_names
from .tokens import FeatureMaps, Result, Scored

FAMILIES = {family.name: family for family in (vim.VIM, videomamba.VIDEOMAMBA, mambareg.MAMBAREG)}

__all__ = [
    "FAMILIES",
    "DynamicVisionMamba",
    "Family",
    "FeatureMaps",
    "Result",
    "Scored",
    "VisionMamba",
    "canonical_name",
    "cumulative_keep",
    "model_names",
]
