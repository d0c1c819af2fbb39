"""A job learns what it computes on without importing a framework."""

import subprocess
import sys

import pytest

from evergreen.errors import TrainingError
from evergreen.training import devices


def test_no_gpus_means_the_cpu():
    """`gpus: 0` takes the CPU wherever it runs."""
    assert devices.resolve(0) == "cpu"


def test_auto_takes_the_cpu_where_no_gpu_is_visible(monkeypatch):
    """Hiding the devices from CUDA hides them from us."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.resolve("auto") == "cpu"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    """`gpus: 1` without a device names the setting and the way out."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(TrainingError, match=r"training\.gpus is 1(?s:.)*gpus: auto"):
        devices.resolve(1)


def test_the_cpu_has_a_name():
    """Lineage can say which processor trained a model."""
    assert devices.hardware("cpu").name.strip() != ""


def test_no_framework_is_imported():
    """Asking for the device does not cost the import of torch."""
    code = (
        "import sys; from evergreen.training import devices; devices.resolve('auto'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
