"""Which digit is this? scikit-learn's bundled images and a plain training function of scikit-learn.

The bundled set has an order but no times. `read` lays that order on a calendar, an image every two hours from
2020-01-01, so that it can be windowed like rows that arrive.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from evergreen.run import Window
    from evergreen.training.jobs import Job, TrainingData

FIRST = datetime(2020, 1, 1, tzinfo=UTC)
APART = timedelta(hours=2)
PIXELS = [f"pixel_{row}{column}" for row in range(8) for column in range(8)]
"""Darkness of each pixel, 0 to 16, from the upper left."""


def read(window: Window) -> Iterator[pl.DataFrame]:
    """Images written within `window`."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = pl.DataFrame(bundled.data.astype(np.int64), schema=PIXELS)
    number = pl.int_range(len(images), dtype=pl.Int64)
    yield images.with_columns(
        digit=pl.Series(bundled.target.astype(np.int64)),
        written_at=pl.lit(FIRST) + number * pl.lit(APART),
    ).filter(pl.col("written_at") >= window.start, pl.col("written_at") < window.end)


def train(data: TrainingData, job: Job) -> None:
    """A logistic regression for each penalty; the one with the lowest loss on the validation window is kept.

    Kept as two matrices in safetensors: skops would do as well for loading without pickle, but writes times and
    memory addresses into its file, so that the same seed would not give the same bytes.
    """
    from safetensors.numpy import save_file
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, log_loss

    job.describe(inputs=PIXELS, requirements=["numpy", "pandas", "safetensors"])
    train, validation = (rows.filter(pl.col(data.target).is_not_null()) for rows in (data.train, data.validation))
    penalties = job.params.get("penalties", [1.0])
    found = []
    for number, penalty in enumerate(penalties, start=1):
        model = LogisticRegression(C=1 / penalty, max_iter=1000, random_state=job.seed)
        model.fit(train[PIXELS].to_numpy() / 16, train[data.target].to_numpy())
        probabilities = model.predict_proba(validation[PIXELS].to_numpy() / 16)
        predicted = model.classes_[probabilities.argmax(axis=1)]
        metrics = {
            "validation_loss": log_loss(validation[data.target].to_numpy(), probabilities, labels=model.classes_),
            "validation_accuracy": accuracy_score(validation[data.target].to_numpy(), predicted),
        }
        job.progress(number, len(penalties), **metrics)
        found.append((metrics["validation_loss"], number, model, metrics))
    _, _, best, metrics = min(found)
    job.progress(len(penalties), len(penalties), **metrics)
    save_file(
        {"weight": best.coef_.T.copy(), "bias": best.intercept_.copy()}, str(job.model_dir / "weights.safetensors")
    )
    described = {"classes": best.classes_.tolist(), "pixels": PIXELS}
    (job.model_dir / "classes.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("loader.py"), job.model_dir / "loader.py")
