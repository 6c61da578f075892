"""What this machine's processor is, as far as the system tells (Linux does)."""

from functools import lru_cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@lru_cache(maxsize=None)
def vendor() -> str:
    """As the processor names it, "GenuineIntel" or "AuthenticAMD"; "" where it is not told."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    named = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in named if name.strip() == "vendor_id"), "")


@lru_cache(maxsize=None)
def largest_cache() -> int:
    """Bytes of the largest cache that the first core reaches; 0 where it is not told."""
    sizes = [0]
    for file in _CACHES.glob("index*/size"):
        try:
            text = file.read_text().strip()
            sizes.append(int(text[:-1]) * _UNITS[text[-1:]])
        except (OSError, ValueError, KeyError):
            continue
    return max(sizes)
