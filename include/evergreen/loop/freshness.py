"""A training rehearsed by a stand-in: what the rows of now are worth, beside those that the champion learned from.

A training as of now would learn from its train window and be judged on what comes after. The stand-in does the same, once
with those rows and once with the champion's; `evaluation/freshness.py` says by what, and why. Nothing of the pack runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evergreen.columns import named
from evergreen.data.store import Store
from evergreen.errors import EvaluationError, StoreError
from evergreen.evaluation import freshness
from evergreen.monitoring.drift import Freshness
from evergreen.pack import DriftRules
from evergreen.run import Manifest, Ref, Run, Window, Windows

if TYPE_CHECKING:
    import polars as pl

log = logging.getLogger("evergreen")


def rehearse(
    run: Run, store: Store, manifest: Manifest, windows: Windows, snapshot: Ref, train: Window, rules: DriftRules
) -> Freshness | None:
    """What newer rows are worth; None where the champion's are as new, no labels have come, or it cannot be said.

    `manifest`, `windows`: of a training as of now. `snapshot`, `train`: the champion's rows, and those it learned from.
    """
    primary, target = run.pack.gate.primary, run.pack.data.target
    if windows.train.end <= train.end:
        return None
    judged = Window(start=windows.train.end, end=windows.holdout.end)
    days = manifest.within(judged)
    try:
        old = [store.path(ref) for ref in store.listing(snapshot).values()]
        new = [store.path(part.object) for part in manifest.within(windows.train)]
        newest = [store.path(part.object) for part in days]
    except StoreError as error:
        log.warning("%s: what newer rows are worth is not known: %s", run.pack.name, error)
        return None
    if not (old and new and newest):
        return None
    import polars as pl

    at = named(run.pack.data.event_time)
    before, now = (
        _labelled(_scanned(files).filter(at.is_between(window.start, window.end, closed="left")), target)
        for files, window in ((old, train), (new, windows.train))
    )
    by_day = [_labelled(_scanned([file]), target).collect() for file in newest]
    by_day = [rows for rows in by_day if rows.height]
    if not by_day:
        return None
    rows = pl.concat(by_day, how="diagonal_relaxed")
    clusters = np.repeat(np.arange(len(by_day)), [day.height for day in by_day])
    try:
        gain = freshness.gain(
            before,
            now,
            rows,
            clusters,
            data=run.pack.data,
            metric=primary.metric,
            confidence=primary.confidence,
            runs=rules.of,
            independent=primary.independent,
        )
    except EvaluationError as error:
        log.warning("%s: what newer rows are worth is not known: %s", run.pack.name, error)
        return None
    if gain is None:
        return None
    return Freshness(
        metric=primary.metric,
        gain=gain.whole,
        parts=gain.parts,
        rows=rows.height,
        judged=judged,
        before=train,
        now=windows.train,
    )


def _scanned(files: Sequence[Path]) -> pl.LazyFrame:
    import polars as pl

    return pl.concat([pl.scan_parquet(file, glob=False) for file in files], how="diagonal_relaxed")


def _labelled(rows: pl.LazyFrame, target: str) -> pl.LazyFrame:
    """The rows whose label has come; none, where the column has not."""
    kind = rows.collect_schema().get(target)
    if kind is None:
        return rows.clear()
    label = named(target)
    return rows.filter(label.is_not_null() & label.is_not_nan() if kind.is_float() else label.is_not_null())
