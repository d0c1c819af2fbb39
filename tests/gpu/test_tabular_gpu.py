"""The built-in trainer on a CUDA device: bfloat16, compilation, and the same promises as on the CPU."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from evergreen.training import tabular

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]

_found = importlib.util.spec_from_file_location(
    "test_tabular_cpu", Path(__file__).parents[1] / "unit" / "training" / "test_tabular.py"
)
cpu = importlib.util.module_from_spec(_found)
_found.loader.exec_module(cpu)


def on_gpu(folder, **arguments):
    made = cpu.Folder(folder, cpu.table(4000), **arguments)
    made.job.device = "cuda"
    return made


def test_a_model_from_the_gpu_predicts_on_the_cpu(tmp_path):
    """The loader, numpy alone, reaches the validation metric that the GPU measured."""
    made = on_gpu(tmp_path).train()
    auc = roc_auc_score(made.validation["late"], made.model.predict(made.validation.to_pandas()))
    assert made.job.metrics["validation_roc_auc"] == pytest.approx(auc, abs=1e-3)


def test_is_as_good_as_on_the_cpu(tmp_path):
    """bfloat16 costs no quality worth the name."""
    gpu = on_gpu(tmp_path / "gpu").train()
    same = cpu.Folder(tmp_path / "cpu", cpu.table(4000)).train()
    assert gpu.job.metrics["validation_loss"] == pytest.approx(same.job.metrics["validation_loss"], abs=0.02)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Deterministic algorithms on the GPU too."""
    first, second = on_gpu(tmp_path / "first").train(), on_gpu(tmp_path / "second").train()
    assert first.bytes == second.bytes


def test_killed_and_resumed_ends_with_the_same_bytes(tmp_path):
    """A checkpoint from the GPU is gone on from exactly."""
    whole = on_gpu(tmp_path / "whole").train()
    halved = tmp_path / "halved"
    with pytest.raises(KeyboardInterrupt):
        on_gpu(halved, checkpoint=cpu.Killed(halved / "checkpoint")).train()
    assert on_gpu(halved).train().bytes == whole.bytes


def test_a_compiled_training_learns_the_same(tmp_path, monkeypatch):
    """Compilation changes the speed, not what is learned."""
    plain = on_gpu(tmp_path / "plain").train()
    monkeypatch.setattr(tabular, "COMPILE_FROM_BATCHES", 1)
    compiled = on_gpu(tmp_path / "compiled").train()
    frame = plain.validation.to_pandas()
    assert np.abs(compiled.model.predict(frame) - plain.model.predict(frame)).mean() < 0.02
