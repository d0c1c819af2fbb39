"""A drift report beside Evidently's preset: the time it takes on a million rows, and whether the two agree.

Both get the same two frames. Ours is profiles of both, the comparison, its JSON and its page; with the reference's
profile at hand, as it is in life, half of that falls away. Evidently runs in an environment of its own (`make bench`
makes `.venv-peers`), in a process of its own, its imports and its reading of the files not counted.

Then columns whose label is known because it was planted: half of them moved, by 0.7 standard deviations or more, to
twice the width or more, in half of their rows, or to other words in 30 % of their rows; of many shapes, and of so many
rows that Evidently measures distances rather than p-values. Each side's verdict on a column is whether it moved.

Goals: at least 50 times as fast; the same verdict on at least 99 % of the columns.

    python benchmarks/drift.py [--rows 1000000]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from evergreen.monitoring import report
from evergreen.monitoring.drift import compare, triage
from evergreen.monitoring.profiles import profile
from evergreen.pack import Data, DriftRules

PEERS = Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"
RULES = DriftRules()
DATA = Data(target="absent", event_time="at")
START, WEEK = datetime(2024, 1, 1, tzinfo=UTC), timedelta(days=7)
COLUMNS = 400
SUITE_ROWS = 20_000
MOVED = 0.3

PEER = """
import json, sys, time
import pandas as pd
from evidently import Report
from evidently.presets import DataDriftPreset
reference, current = (pd.read_parquet(path) for path in sys.argv[1:])
began = time.perf_counter()
made = Report([DataDriftPreset()]).run(current, reference)
found = made.dict()
page = made.get_html_str(as_iframe=False)
seconds = time.perf_counter() - began
moved = {
    each["config"]["column"]: bool(each["value"] >= each["config"]["threshold"])
    for each in found["metrics"]
    if each["metric_name"].startswith("ValueDrift") and "p_value" not in each["metric_name"]
}
print(json.dumps({"seconds": seconds, "moved": moved}))
"""


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--rows", type=int, default=1_000_000)
    rows = asked.parse_args().rows
    if not PEERS.exists():
        sys.exit(f"{PEERS} is not there: make .venv-peers/.ready")
    rng = np.random.default_rng(7)

    ours(wide(rng, 1000), wide(rng, 1000))  # imports
    before, now = wide(rng, rows), wide(rng, rows)
    theirs = evidently(before, now)["seconds"]
    whole, window = ours(before, now)
    print(f"report on {rows} rows of {before.width} columns, twice")
    print(f"evidently's preset            {theirs:8.2f} s")
    print(f"ours, both profiles made      {whole:8.2f} s   {theirs / whole:.0f} × as fast (goal ≥ 50)")
    print(f"ours, reference at hand       {window:8.2f} s   {theirs / window:.0f} × as fast")

    before, now, labels = suite(rng)
    theirs_moved = evidently(before, now)["moved"]
    compared = compare(profile(before, START, START + WEEK), profile(now, START + WEEK, START + 2 * WEEK), RULES, DATA)
    violated = {each.column for each in compared.violated}
    same = Counter((name in violated) == theirs_moved[name] for name in labels)
    print(f"\n{len(labels)} labelled columns of {SUITE_ROWS} rows, {sum(labels.values())} of them moved")
    print(f"the same verdict on {same[True] / len(labels):.1%} (goal ≥ 99 %)")
    for who, verdict in (("ours", {name: name in violated for name in labels}), ("evidently", theirs_moved)):
        right = sum(verdict[name] == label for name, label in labels.items())
        print(f"{who:<10} as labelled on {right / len(labels):.1%}")
    for name in labels:
        if (name in violated) != theirs_moved[name]:
            print(
                f"  they differ on {name}: ours {name in violated}, evidently {theirs_moved[name]}, label {labels[name]}"
            )


def ours(before: pl.DataFrame, now: pl.DataFrame) -> tuple[float, float]:
    """Seconds of everything, and of what is left where the reference's profile is at hand."""
    began = time.perf_counter()
    reference = profile(before, START, START + WEEK)
    at_hand = time.perf_counter()
    window = profile(now, START + WEEK, START + 2 * WEEK)
    found = compare(reference, window, RULES, DATA)
    kind = triage([found], RULES)
    report.to_json("wide", kind, [found])
    report.page("wide", kind, [found], RULES, reference, window)
    end = time.perf_counter()
    return end - began, end - at_hand


def wide(rng: np.random.Generator, rows: int) -> pl.DataFrame:
    """Fifteen columns of numbers and five of words."""
    words = np.array([f"word {place}" for place in range(30)])
    columns = {f"number {place}": rng.normal(place, 1 + place, rows) for place in range(15)}
    return pl.DataFrame(
        {**columns, **{f"word {place}": words[rng.integers(0, 5 + 5 * place, rows)] for place in range(5)}}
    )


def suite(rng: np.random.Generator) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, bool]]:
    """Columns of many shapes; every second one moves, in a way that its shape can."""
    before: dict[str, np.ndarray] = {}
    now: dict[str, np.ndarray] = {}
    labels: dict[str, bool] = {}
    n = SUITE_ROWS
    letters = np.array(list("abcdefgh"))
    for place in range(COLUMNS):
        shape = ("normal", "lognormal", "uniform", "two hills", "gamma", "words")[place % 6]
        moves = (place // 6) % 2 == 1
        name = f"{shape} {place}"
        if shape == "words":
            shares = others = rng.dirichlet(np.full(len(letters), 2.0))
            while moves and abs(others - shares).sum() / 2 < MOVED:  # the share of rows with another word
                others = rng.dirichlet(np.full(len(letters), 2.0))
            before[name] = letters[rng.choice(len(letters), n, p=shares)]
            now[name] = letters[rng.choice(len(letters), n, p=others)]
        else:
            first, second = drawn(rng, shape, n), drawn(rng, shape, n)
            how = ("shift", "scale", "mixed")[place % 3]
            if moves and how == "shift":
                second = second + rng.uniform(0.7, 1.5) * first.std() * rng.choice([-1, 1])
            elif moves and how == "scale":
                second = (second - second.mean()) * rng.uniform(2.0, 3.0) + second.mean()
            elif moves:
                second = np.where(rng.random(n) < 0.5, second + 2 * first.std(), second)
            before[name], now[name] = first, second
        labels[name] = moves
    return pl.DataFrame(before), pl.DataFrame(now), labels


def drawn(rng: np.random.Generator, shape: str, n: int) -> np.ndarray:
    if shape == "normal":
        return rng.normal(3, 2, n)
    if shape == "lognormal":
        return rng.lognormal(1, 0.6, n)
    if shape == "uniform":
        return rng.uniform(-1, 4, n)
    if shape == "gamma":
        return rng.gamma(3, 2, n)
    return np.where(rng.random(n) < 0.4, rng.normal(-3, 1, n), rng.normal(2, 1.5, n))


def evidently(before: pl.DataFrame, now: pl.DataFrame) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("before.parquet", "now.parquet")]
        for frame, path in zip((before, now), paths, strict=True):
            frame.write_parquet(path)
        done = subprocess.run(
            [str(PEERS), "-W", "ignore", "-c", PEER, *paths], capture_output=True, text=True, check=True
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
