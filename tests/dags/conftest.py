"""Packs in a folder of their own, and an Airflow home that is not the user's: set before Airflow is first imported."""

import os
import sys
import tempfile

import pytest

from evergreen.laws import scaffold

if "airflow" not in sys.modules:
    os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="evergreen-tests-airflow-")
    os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"


@pytest.fixture
def packs(tmp_path, monkeypatch):
    """A folder with the packs apple and pear, where this process finds packs."""
    folder = tmp_path / "packs"
    for name in ("apple", "pear"):
        scaffold(folder, name)
    monkeypatch.setenv("EVERGREEN_PACKS", str(folder))
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path / "home"))
    return folder
