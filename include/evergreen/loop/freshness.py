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

from evergreen import looks
from evergreen.data.store import Store
from evergreen.errors import EvaluationError, StoreError
from evergreen.evaluation import freshness
from evergreen.monitoring.drift import Freshness
from evergreen.run import Manifest, Ref, Run, Window, Windows

if TYPE_CHECKING:
    import polars as pl

log = logging.getLogger("evergreen")


def rehearse(
    run: Run, store: Store, manifest: Manifest, windows: Windows, snapshot: Ref, train: Window
) -> Freshness | None:
    """What newer rows are worth; None where the champion's are as new, no labels have come, or it cannot be said.

    `manifest`, `windows`: of a training as of now. `snapshot`, `train`: the champion's rows, and those it learned from.
    """
    primary, target = run.pack.gate.primary, run.pack.data.target
    if windows.train.end <= train.end:
        return None
    judged = Window(start=windows.train.end, end=windows.holdout.end)
    parts = manifest.within(judged)
    try:
        before = _labelled(_read(run, [store.path(ref) for ref in store.listing(snapshot).values()], train), target)
        now = _labelled(_read(run, [store.path(part.object) for part in manifest.within(windows.train)]), target)
        newest = [_labelled(_read(run, [store.path(part.object)], all_of=True), target) for part in parts]
    except StoreError as error:
        log.warning("%s: what newer rows are worth is not known: %s", run.pack.name, error)
        return None
    import polars as pl

    if before is None or now is None or not any(each is not None and each.height for each in newest):
        return None
    clusters = np.repeat(np.arange(len(newest)), [0 if each is None else each.height for each in newest])
    rows = pl.concat([each for each in newest if each is not None], how="diagonal_relaxed")
    try:
        gain = freshness.gain(
            before,
            now,
            rows,
            clusters,
            data=run.pack.data,
            metric=primary.metric,
            confidence=primary.confidence,
            independent=primary.independent,
        )
    except EvaluationError as error:
        log.warning("%s: what newer rows are worth is not known: %s", run.pack.name, error)
        return None
    if gain is None:
        return None
    return Freshness(metric=primary.metric, gain=gain, rows=rows.height, judged=judged, before=train, now=windows.train)


def _read(
    run: Run, files: Sequence[Path], window: Window | None = None, *, all_of: bool = False
) -> pl.DataFrame | None:
    """Rows of the files, within the window if there is one: a sample for the stand-in, or all; None where there are none."""
    import polars as pl

    if not files:
        return None
    rows = pl.concat([pl.scan_parquet(file) for file in files], how="diagonal_relaxed")
    if window is not None:
        rows = rows.filter(pl.col(run.pack.data.event_time).is_between(window.start, window.end, closed="left"))
    if all_of:
        return rows.collect()
    found = freshness.sampled(rows, int(rows.select(pl.len()).collect().item()))
    return found if found.height else None


def _labelled(rows: pl.DataFrame | None, target: str) -> pl.DataFrame | None:
    if rows is None or target not in rows.columns:
        return None
    return rows.filter(looks.labelled(rows[target]))
