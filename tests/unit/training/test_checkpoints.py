"""Checkpoints are whole or passed over."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from evergreen.training.checkpoints import FolderCheckpoint, write_whole


def test_nothing_is_loaded_from_an_empty_place(tmp_path):
    """A job that kept nothing starts from the beginning."""
    assert FolderCheckpoint(tmp_path / "none").load() is None


def test_numpy_comes_back_as_it_was(tmp_path):
    """Values, shapes and types survive, transposed and zero-dimensional arrays included."""
    tensors = {"w": np.arange(6).reshape(2, 3).T, "b": np.float32(3)}
    FolderCheckpoint(tmp_path).save(4, tensors, {"best": 0.5})
    step, loaded, state = FolderCheckpoint(tmp_path).load()
    assert (step, state) == (4, {"best": 0.5})
    assert all(loaded[name].dtype == tensors[name].dtype for name in tensors)
    assert all(np.array_equal(loaded[name], tensors[name]) for name in tensors)


def test_torch_comes_back_as_torch(tmp_path):
    """Who saved torch tensors loads torch tensors: half precision and tied weights too."""
    weight = torch.ones(3, dtype=torch.bfloat16)
    FolderCheckpoint(tmp_path).save(1, {"a": weight, "tied": weight}, {})
    _, loaded, _ = FolderCheckpoint(tmp_path).load()
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["tied"], weight)


def test_the_last_one_wins(tmp_path):
    """Loading gives the highest step, and no more than two steps are kept on the disk."""
    checkpoint = FolderCheckpoint(tmp_path)
    for step in (1, 2, 10):
        checkpoint.save(step, {"w": np.full(2, step)}, {})
    assert checkpoint.load()[0] == 10
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_last_one_is_passed_over(tmp_path, suffix, damage):
    """The one before is loaded when a file of the last is truncated, altered or missing."""
    checkpoint = FolderCheckpoint(tmp_path)
    checkpoint.save(1, {"w": np.ones(100)}, {})
    checkpoint.save(2, {"w": np.zeros(100)}, {})
    file = tmp_path / f"000000000002.{suffix}"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content.replace(b"sha256", b"sha257") if suffix == "json" else content[:-1] + b"\x01")
    step, tensors, _ = checkpoint.load()
    assert step == 1
    assert np.array_equal(tensors["w"], np.ones(100))


def test_two_processes_may_write_one_file_at_once(tmp_path, monkeypatch):
    """A second one that begins and ends while the first is about to name its own: the file is whole, and nobody fails."""
    file, fsync = tmp_path / "pid.json", os.fsync
    other = "import sys; from pathlib import Path; from evergreen.training.checkpoints import write_whole\n"
    other += "write_whole(Path(sys.argv[1]), b'theirs')"

    def meanwhile(descriptor):
        fsync(descriptor)
        subprocess.run([sys.executable, "-c", other, str(file)], check=True)

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_whole(file, b"ours")
    assert ([each.name for each in tmp_path.iterdir()], file.read_bytes()) == (["pid.json"], b"ours")
