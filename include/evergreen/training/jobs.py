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

import importlib.metadata
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from evergreen.errors import TrainingError, nearest
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
    params: dict[str, Any] = Field(default_factory=dict)
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
    metrics: dict[str, float] = field(default_factory=dict, init=False)
    """What was reported last."""
    _written: tuple[int, float] | None = field(default=None, init=False, repr=False)
    """The thousandth of the work and the time (monotonic, s) of the last line written."""

    def progress(self, step: int, of: int, **metrics: float) -> None:
        """Report step `step` of `of` (the first is 1) and what was measured: shown live, kept as the training curve.

        Cheap enough for every batch: a line is written for each thousandth of the work, and at least ten a second.
        Raises TrainingError when a metric is NaN or infinite.
        """
        self.metrics = {name: float(value) for name, value in metrics.items()}
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{'NaN' if math.isnan(value) else 'infinite'} {name} at step {step} of {of}",
                    fix="lower the learning rate, and look for empty or very large values in the input columns",
                )
        now, thousandth = time.monotonic(), step * 1000 // max(of, 1)
        if self._written is None:
            _forget_from(self.folder / "progress.jsonl", step)
        elif thousandth <= self._written[0] and step < of and now - self._written[1] < 0.1:
            return
        self._written = (thousandth, now)
        line = {"step": step, "of": of, "time": round(time.time(), 3), "metrics": self.metrics}
        with (self.folder / "progress.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def describe(self, *, inputs: Sequence[str], requirements: Sequence[str]) -> None:
        """Say which raw columns the model takes and which distributions its `loader.py` imports.

        Without this call: all columns but the target, and numpy and pandas. Types are taken from the training rows,
        versions from what is installed. Raises TrainingError for a column or a distribution that is not there.
        """
        types = column_types(self.folder / "input" / "train")
        for name in inputs:
            if name not in types:
                raise TrainingError(f"describe(inputs=…): the data has no column {name!r}", fix=nearest(name, types))
        self.inputs = {name: types[name] for name in inputs}
        self.requirements = tuple(sorted(pinned(name) for name in requirements))


def pinned(distribution: str) -> str:
    """`numpy==2.4.6`: the distribution at its installed version, without a local label such as `+cpu`."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise TrainingError(
            f"describe(requirements=…): no distribution {distribution!r} is installed",
            fix="give its name alone, as pip knows it (scikit-learn, not sklearn), or install it",
        ) from None
    return f"{distribution}=={version.partition('+')[0]}"


def column_types(folder: Path) -> dict[str, str]:
    """Column → canonical type (bool, int, float, string, datetime, date) of the Parquet files in `folder`."""
    import polars as pl

    empty = [pl.DataFrame(schema=pl.read_parquet_schema(file)) for file in sorted(folder.glob("*.parquet"))]
    return {name: _canonical(kind) for name, kind in pl.concat(empty, how="vertical_relaxed").schema.items()}


def _canonical(kind: pl.DataType) -> str:
    import polars as pl

    if kind.is_integer():
        return "int"
    if kind.is_float() or kind.is_decimal():
        return "float"
    names = {pl.Boolean: "bool", pl.Date: "date", pl.Datetime: "datetime"}
    return names.get(kind.base_type(), "string")


def _forget_from(file: Path, step: int) -> None:
    """Drop the lines from `step` on: a restarted job does those steps again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] >= step:
            break
        kept.append(line)
    part = file.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(file)


def _read(folder: Path) -> pl.DataFrame:
    import polars as pl

    return pl.concat([pl.read_parquet(file) for file in sorted(folder.glob("*.parquet"))], how="vertical_relaxed")
