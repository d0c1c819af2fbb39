"""Jobs: a folder in, a folder out, run by `evergreen.runner` in a process of its own that outlives the Airflow task.

The folder of a job, under `settings.jobs`:

    job.json            the JobSpec
    input/              what the job reads: `pack/` (the pack's Python) and, by kind,
                        train: `train/*.parquet`, `validation/*.parquet` (never a hold-out row)
                        score: `model/` (a model folder), `rows/*.parquet` (no target column)
    output/             what it leaves: `model/`, `predictions.parquet` or `frames/*.arrow`; `result.json` last, so that
                        its existence is the proof
    checkpoint/         what a restarted job goes on from
    heartbeat           touched while the job lives
    progress.jsonl      a line for each report of progress
    log.txt             its standard output and error

A job never talks to Airflow, MLflow or the events database.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from evergreen.run import Value, Window

if TYPE_CHECKING:
    import polars as pl


class JobSpec(Value):
    """`job.json`: all that a job is told. Paths inside are relative to its folder, so that it can move."""

    id: str
    kind: Literal["read", "train", "score"]
    pack: str
    call: str | None = None
    """`file:function` within `input/pack/`; none for `score`."""
    target: str
    event_time: str
    task: Literal["binary", "multiclass", "regression"]
    params: dict[str, Any] = {}
    seed: int = 7
    gpus: Literal["auto"] | int = "auto"
    timeout_s: float
    window: Window | None = None
    """For `read`: which rows."""


class TrainingData:
    """What a training function may look at: the training and the validation window, as polars frames."""

    def __init__(self, folder: Path, *, target: str, event_time: str, task: str) -> None:
        self.folder = folder
        self.target = target
        self.event_time = event_time
        self.task = task

    @cached_property
    def train(self) -> pl.DataFrame:
        """Rows of the training window, target included, in order of time."""
        return _read(self.folder / "train")

    @cached_property
    def validation(self) -> pl.DataFrame:
        """Rows of the validation window: the only ones to stop early or to choose by."""
        return _read(self.folder / "validation")

    @property
    def features(self) -> list[str]:
        """Columns that are neither target nor event time."""
        return [name for name in self.train.columns if name not in (self.target, self.event_time)]


class Checkpoint(Protocol):
    """Where a training function keeps what it needs to go on after a kill (`evergreen.training.checkpoints`)."""

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Keep tensors (safetensors) and JSON state, atomically; the last one wins."""

    def load(self) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The last (step, tensors, state) that was kept whole, or None."""


@dataclass
class Job:
    """What a training function is handed beside its data."""

    params: Mapping[str, Any]
    seed: int
    device: str
    """`cpu` or `cuda`."""
    model_dir: Path
    """Leave the model folder here: `loader.py` and its data; no pickle."""
    checkpoint: Checkpoint
    folder: Path
    inputs: dict[str, str] | None = field(default=None, init=False)
    requirements: tuple[str, ...] | None = field(default=None, init=False)

    def progress(self, step: int, of: int, **metrics: float) -> None:
        """Report step `step` of `of` and what was measured: shown live, kept as the training curve."""
        raise NotImplementedError

    def describe(self, *, inputs: Sequence[str], requirements: Sequence[str]) -> None:
        """Say which raw columns the model takes and which distributions its `loader.py` imports.

        Without this call: all columns but the target, and numpy and pandas.
        """
        raise NotImplementedError


def _read(folder: Path) -> pl.DataFrame:
    import polars as pl

    return pl.concat([pl.read_parquet(file) for file in sorted(folder.glob("*.parquet"))], how="vertical_relaxed")
