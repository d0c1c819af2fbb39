"""Checkpoints: what a training function keeps so that a killed job goes on instead of starting over.

A checkpoint is `<step>.safetensors` and, written last, `<step>.json` with the step, the state and the sha256 of the
tensors' file. The one before the last is kept too: a checkpoint that is not whole is passed over, never trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FolderCheckpoint:
    """The checkpoints in one folder."""

    folder: Path

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Keep tensors (all torch, or all numpy) and JSON state; the last two steps stay."""
        torch = any(type(tensor).__module__.partition(".")[0] == "torch" for tensor in tensors.values())
        content = _torch_bytes(tensors) if torch else _numpy_bytes(tensors)
        record = {
            "step": step,
            "framework": "torch" if torch else "numpy",
            "sha256": hashlib.sha256(content).hexdigest(),
            "state": dict(state),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / f"{step:012d}.safetensors", content)
        write_whole(self.folder / f"{step:012d}.json", json.dumps(record).encode())
        for old in sorted(self.folder.glob("*.json"))[:-2]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def load(self) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The last (step, tensors, state) that is whole, or None. Tensors are torch's, on the CPU, if they were saved so."""
        for file in sorted(self.folder.glob("*.json"), reverse=True):
            try:
                record = json.loads(file.read_bytes())
                content = file.with_suffix(".safetensors").read_bytes()
            except (OSError, ValueError):
                continue
            if isinstance(record, dict) and record.get("sha256") == hashlib.sha256(content).hexdigest():
                return record["step"], _tensors(content, record["framework"]), record["state"]
        return None


def write_whole(file: Path, content: bytes) -> None:
    """Write `file` so that it is there in full or not at all, even after a power cut, whoever else writes it just now."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def _torch_bytes(tensors: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save

    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    return bytes(save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}))


def _numpy_bytes(tensors: Mapping[str, Any]) -> bytes:
    import numpy as np
    from safetensors.numpy import save

    return bytes(save({name: np.array(tensor, order="C") for name, tensor in tensors.items()}))


def _tensors(content: bytes, framework: str) -> dict[str, Any]:
    if framework == "torch":
        from safetensors.torch import load
    else:
        from safetensors.numpy import load
    return dict(load(content))
