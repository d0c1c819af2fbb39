"""The built-in trainer against LightGBM on real flights: hold-out ROC-AUC, month by month.

Both see the same columns and the same windows of the pack `flight_delay` (60 days of training, 7 of validation, 14 of
hold-out), as of the first of each month from 2013-04 to 2013-12. The peer is `LGBMClassifier()` with its defaults,
categories as pandas categories, trained on the training window; a second column shows it trained on training and
validation window together, which the built-in trainer is never allowed to do.

Tuned on other rows: architecture and params were chosen as of the fifteenth of each month, whose hold-outs (from the
first to the fourteenth) share no row with those measured here (`--tuning` prints that table). Seconds are of training
alone, the trainer on one thread and LightGBM on two.

Goal: the trainer's mean is not below LightGBM's by more than 0.005.

    python benchmarks/quality.py [--tuning]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import lightgbm
import numpy as np
import pandas as pd
import polars as pl
from sklearn.metrics import roc_auc_score

from evergreen.pack import Pack
from evergreen.run import Window, Windows
from evergreen.training import tabular
from evergreen.training.checkpoints import FolderCheckpoint
from evergreen.training.jobs import Job, TrainingData
from evergreen.training.tabular_loader import load

ROOT = Path(__file__).resolve().parents[1]
GOAL = -0.005


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", action="store_true", help="the fifteenth of each month instead of the first")
    parser.add_argument("--params", type=json.loads, default={}, help="JSON over the pack's params")
    arguments = parser.parse_args()
    pack = Pack.load(ROOT / "include" / "packs" / "flight_delay")
    params = {**pack.training.params, **arguments.params}
    rows = year(pack)
    print(f"LightGBM {lightgbm.__version__} defaults, tabular {params}")
    print(
        f"{'as of':12}{'rows':>8}{'tabular':>10}{'s':>7}{'LightGBM':>10}{'s':>7}{'difference':>12}{'(LightGBM + validation)':>26}"
    )
    found = []
    for month in range(4, 13):
        as_of = datetime(2013, month, 15 if arguments.tuning else 1, tzinfo=UTC)
        windows = Windows.ending(as_of, pack.data)
        part = {name: within(rows, getattr(windows, name)) for name in ("train", "validation", "holdout")}
        ours, seconds = tabular_auc(pack, params, part)
        theirs, their_seconds = lightgbm_auc(pack, part["train"], part["holdout"])
        more, _ = lightgbm_auc(pack, pl.concat([part["train"], part["validation"]]), part["holdout"])
        found.append((ours, theirs, more, seconds, their_seconds))
        print(
            f"{as_of:%Y-%m-%d}  {part['train'].height:8}{ours:10.4f}{seconds:7.1f}{theirs:10.4f}{their_seconds:7.1f}"
            f"{ours - theirs:+12.4f}{more:26.4f}",
            flush=True,
        )
    ours, theirs, more, seconds, their_seconds = np.mean(found, axis=0)
    print(f"{'mean':20}{ours:10.4f}{seconds:7.1f}{theirs:10.4f}{their_seconds:7.1f}{ours - theirs:+12.4f}{more:26.4f}")
    reached = ours - theirs >= GOAL
    print(f"goal: a mean difference of at least {GOAL}: {'reached' if reached else 'MISSED'}")
    return 0 if reached else 1


def year(pack: Pack) -> pl.DataFrame:
    """All rows of 2013, as the pack reads them."""
    sys.path.insert(0, str(pack.folder))
    import model

    rows: pl.DataFrame = pl.concat(
        model.read(Window(start=datetime(2013, 1, 1, tzinfo=UTC), end=datetime(2014, 1, 1, tzinfo=UTC)))
    )
    return rows


def within(rows: pl.DataFrame, window: Window) -> pl.DataFrame:
    time_of = pl.col("scheduled_departure")
    return rows.filter(time_of >= window.start, time_of < window.end)


def tabular_auc(pack: Pack, params: dict[str, Any], part: dict[str, pl.DataFrame]) -> tuple[float, float]:
    """Hold-out AUC through the model folder, and the seconds that training took, encoding and writing included."""
    with tempfile.TemporaryDirectory() as name:
        data, job = training_job(Path(name), pack, params, part)
        started = time.perf_counter()
        tabular.train(data, job)
        seconds = time.perf_counter() - started
        rows = part["holdout"]
        return roc_auc_score(rows["late"], load(job.model_dir).predict(rows.drop("late").to_pandas())), seconds


def training_job(
    folder: Path, pack: Pack, params: dict[str, Any], part: dict[str, pl.DataFrame]
) -> tuple[TrainingData, Job]:
    """A job folder with the rows in it, as the runner hands it to a training function."""
    for window in ("train", "validation"):
        (folder / "input" / window).mkdir(parents=True)
        part[window].write_parquet(folder / "input" / window / "rows.parquet")
    (folder / "model").mkdir()
    data = TrainingData(folder / "input", target=pack.data.target, event_time=pack.data.event_time, task=pack.data.task)
    job = Job(
        params=params,
        seed=pack.training.seed,
        device="cpu",
        model_dir=folder / "model",
        checkpoint=FolderCheckpoint(folder / "checkpoint"),
        folder=folder,
    )
    return data, job


def lightgbm_auc(pack: Pack, train: pl.DataFrame, holdout: pl.DataFrame) -> tuple[float, float]:
    levels = {
        name: sorted(train[name].drop_nulls().unique()) for name, kind in train.schema.items() if kind == pl.String
    }

    def features(rows: pl.DataFrame) -> pd.DataFrame:
        frame = rows.drop(pack.data.target, pack.data.event_time).to_pandas()
        return frame.assign(**{name: pd.Categorical(frame[name], categories=known) for name, known in levels.items()})

    started = time.perf_counter()
    model = lightgbm.LGBMClassifier(n_jobs=2, verbose=-1).fit(features(train), train["late"].to_numpy())
    seconds = time.perf_counter() - started
    predicted: Any = model.predict_proba(features(holdout))
    return roc_auc_score(holdout["late"], predicted[:, 1]), seconds


if __name__ == "__main__":
    sys.exit(main())
