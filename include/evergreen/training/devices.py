"""What a job computes on. Asks the driver's own tool; imports no framework."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Literal

from evergreen.errors import TrainingError
from evergreen.run import Hardware


def resolve(gpus: Literal["auto"] | int) -> str:
    """`cuda` or `cpu` for the pack's `training.gpus`. Raises TrainingError when a GPU is asked for and there is none."""
    if gpus == 0:
        return "cpu"
    if _gpu() is not None and _torch_can():
        return "cuda"
    if gpus == "auto":
        return "cpu"
    raise TrainingError(
        f"training.gpus is {gpus}, and no CUDA device can be used here: "
        + ("nvidia-smi names none" if _gpu() is None else "the torch that is installed is built for the CPU only"),
        fix="write gpus: auto to take the CPU where there is no GPU, or run where there is one",
    )


def hardware(device: str) -> Hardware:
    """The device, its name and its driver."""
    gpu = _gpu() if device == "cuda" else None
    if gpu is not None:
        return Hardware(device="cuda", name=gpu[0], driver=gpu[1])
    return Hardware(device=device, name=_cpu_name())


def _gpu() -> tuple[str, str] | None:
    """(name, driver version) of the first GPU this process may use; None when there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    if first in ("", "-1") or not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()):
        return None
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run([*asked, "-i", first], capture_output=True, text=True, timeout=30, check=True)
        name, _, driver = found.stdout.splitlines()[0].rpartition(",")
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    return name.strip(), driver.strip()


def _torch_can() -> bool:
    """Whether torch, if installed, has CUDA: its CPU builds are labelled `+cpu`."""
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return True


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
