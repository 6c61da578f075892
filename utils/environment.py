"""The versions and hardware of a run, for its record."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "timm", "triton", "mamba-ssm", "numpy")


def describe_environment(*packages: str) -> dict[str, str]:
    """Versions of Python and packages (`packages` in addition), processor and GPUs."""
    environment = {"python": platform.python_version()}
    for package in (*PACKAGES, *packages):
        try:
            environment[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    environment["system"] = f"{platform.system()} {platform.machine()}"
    environment["cpu"] = f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        environment["cuda"] = str(torch.version.cuda)
        environment["gpus"] = ", ".join(
            f"{names.count(name)} x {name}" for name in dict.fromkeys(names)
        )
    return environment


def _cpu_name() -> str:
    """The processor's name as reported by Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
