"""How much memory and time a wide table takes: the chain and one look of the monitor, process by process.

Goal: 2,000 columns × 100,000 rows within 4 GiB in every process. A pack is made in a home that is thrown away; `evergreen
run` and `evergreen drift` are run on it as a user runs them; every process of theirs, jobs too, is watched for its
largest resident set. The peer is scikit-learn's `permutation_importance`, once for each column, on the same trained model
and on as many rows as Evergreen samples; it stands beside the importance that the run's `score` job measured.

    python benchmarks/wide.py                      # 300 columns × 10,000 rows
    python benchmarks/wide.py 2000 100000          # minutes; the peer is left out beyond 500 columns
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil

DAYS = 40
GIB = 2**30
GOAL_GIB = 4.0
PEER_COLUMNS = 500
"""Beyond, the peer takes hours."""
FIRST = datetime(2024, 1, 1, tzinfo=UTC)
PACK = """
description: Many sensors.
owner: me@example.com
source: {kind: parquet, path: "rows/*.parquet"}
data: {target: y, event_time: at, train: 14d, validation: 3d, holdout: 7d}
expectations:
  - expect_column_values_to_not_be_null: {column: sensor_0000_mean_over_the_last_fifteen_minutes}
training: {call: "model:train", params: {epochs: 1, batch_size: 256, members: 2, hidden: [16]}}
gate: {primary: {metric: roc_auc, margin: 0.3}}
triggers: {drift: {window: 7d, violated: 1 of 1}}
"""
MODEL = "from evergreen.training import tabular\n\n\ndef train(data, job):\n    tabular.train(data, job)\n"
PEER = """
import importlib.util, json, sys, time
import numpy as np, pandas as pd
from sklearn.inspection import permutation_importance
from sklearn.metrics import roc_auc_score
spec = importlib.util.spec_from_file_location("loader", sys.argv[1] + "/loader.py")
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
model = module.load(sys.argv[1])
rows = pd.read_parquet(sys.argv[2])
class Estimator:
    def fit(self, X, y): return self
    def predict(self, X): return model.predict(X)
began = time.perf_counter()
X, y = rows.drop(columns=["y", "at"]), rows["y"].to_numpy()
permutation_importance(Estimator(), X, y, n_repeats=1, random_state=0, scoring=lambda e, X, y: roc_auc_score(y, e.predict(X)))
print(time.perf_counter() - began)
"""


def main() -> None:
    columns, rows = (int(each) for each in (*sys.argv[1:3], "300", "10000")[:2]) if len(sys.argv) > 2 else (300, 10_000)
    print(f"{columns} columns × {rows} rows over {DAYS} days; the goal is {GOAL_GIB:g} GiB in every process")
    with tempfile.TemporaryDirectory(prefix="evergreen-wide-") as folder:
        root = Path(folder)
        write(root / "packs" / "wide", columns, rows // DAYS)
        env = os.environ | {"EVERGREEN_HOME": str(root / "home"), "EVERGREEN_PACKS": str(root / "packs")}
        evergreen = Path(sys.executable).with_name("evergreen")
        largest = 0.0
        for words in (("run", "wide", "--as-of", "2024-01-26"), ("drift", "wide", "--as-of", "2024-02-10")):
            seconds, peaks, output = watched([str(evergreen), *words], root, env)
            print(f"\nevergreen {' '.join(words)}: {seconds:.0f} s")
            for name, peak in sorted(peaks.items(), key=lambda each: -each[1])[:6]:
                print(f"  {peak / GIB:6.2f} GiB  {name}")
            print("  " + "\n  ".join(line for line in output.splitlines() if "importance" in line or "verdict" in line))
            largest = max(largest, max(peaks.values()) / GIB)
        size = sum(file.stat().st_size for file in (root / "home").rglob("*") if file.is_file())
        pages = [file.stat().st_size for file in (root / "home").rglob("drift/*.html")]
        print(f"\nhome {size / GIB:.2f} GiB, page of the monitor {max(pages, default=0) / 2**20:.1f} MiB")
        print(f"largest process {largest:.2f} GiB  ({'within' if largest <= GOAL_GIB else 'past'} the goal)")
        if columns <= PEER_COLUMNS:
            peer(root, columns)


def write(pack: Path, columns: int, rows: int) -> None:
    """Write the pack, a file a day; the label hangs on the first column."""
    (pack / "rows").mkdir(parents=True)
    (pack / "pack.yaml").write_text(PACK)
    (pack / "model.py").write_text(MODEL)
    for day in range(DAYS):
        rng = np.random.default_rng(day)
        x = rng.normal(size=(rows, columns)).round(3)
        frame: dict[str, Any] = {"at": [FIRST + timedelta(days=day, seconds=86400 * n // rows) for n in range(rows)]}
        frame |= {"y": (rng.random(rows) < 1 / (1 + np.exp(-2 * x[:, 0]))).astype("int64")}
        frame |= {f"sensor_{n:04}_mean_over_the_last_fifteen_minutes": x[:, n] for n in range(columns)}
        pl.DataFrame(frame).write_parquet(pack / "rows" / f"{day:02}.parquet")


def watched(command: list[str], root: Path, env: dict[str, str]) -> tuple[float, dict[str, int], str]:
    """Run a command; return its seconds, the largest resident set of each kind of process of it, and what it prints."""
    began = time.perf_counter()
    peaks: dict[str, int] = defaultdict(int)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, cwd=root)
        while process.poll() is None:
            for each in psutil.process_iter(["pid", "cmdline", "memory_info"]):
                words = each.info["cmdline"] or []
                if each.pid == process.pid or any(str(root) in word for word in words):
                    name = next(
                        (f"{word.split('/')[-1].split('-')[0]} job" for word in words if "/jobs/" in word), "evergreen"
                    )
                    peaks[name] = max(peaks[name], each.info["memory_info"].rss if each.info["memory_info"] else 0)
            time.sleep(0.1)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(text[-3000:])
    return time.perf_counter() - began, peaks, text


def peer(root: Path, columns: int) -> None:
    """Time scikit-learn's permutation importance on the trained model."""
    model = next(file.parent for file in (root / "home" / "mlartifacts").rglob("loader.py"))
    days = [pl.read_parquet(file) for file in sorted((root / "packs" / "wide" / "rows").glob("*.parquet"))]
    sample = pl.concat(days[18:25]).sample(min(2000, 7 * days[0].height), seed=0)
    sample.write_parquet(root / "sample.parquet")
    seconds, peaks, output = watched(
        [sys.executable, "-c", PEER, str(model), str(root / "sample.parquet")], root, dict(os.environ)
    )
    print(
        f"\nscikit-learn's permutation_importance of {columns} columns on {sample.height} rows: "
        f"{float(output.split()[-1]):.0f} s, {max(peaks.values()) / GIB:.2f} GiB ({seconds:.0f} s with its start)"
    )


if __name__ == "__main__":
    main()
