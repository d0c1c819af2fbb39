"""The built-in trainer's speed on the CPU, beside two loops written by hand over the same network.

Same rows (the training window of `flight_delay` as of 2013-04-01), same network, batch size and number of threads:

- the trainer: the epoch loop of `tabular.fit`, with its schedule, reports and reproducibility;
- bare: forward, backward and `torch.optim.AdamW(fused=True)` on resident tensors, batches by index, nothing else;
- loader: the same over `TensorDataset` and `DataLoader(shuffle=True)` without workers, as tutorials show.

They take turns, an epoch each a round, and each ratio is the median over the rounds of the trainer's samples per
second to the peer's in the same round: what else the machine does in between falls on all.

Goal: at least 0.9 of the bare loop's speed.

    python benchmarks/trainer.py [--rounds 15] [--threads 1]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from quality import ROOT, training_job, within, year
from torch.utils.data import DataLoader, TensorDataset

from evergreen.pack import Pack
from evergreen.run import Windows
from evergreen.training import tabular
from evergreen.training.jobs import Job

GOAL = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    pack = Pack.load(ROOT / "include" / "packs" / "flight_delay")
    params = tabular.Params.of({**pack.training.params, "epochs": 1, "threads": arguments.threads})
    windows = Windows.ending(datetime(2013, 4, 1, tzinfo=UTC), pack.data)
    table = year(pack)
    part = {name: within(table, getattr(windows, name)) for name in ("train", "validation")}
    with tempfile.TemporaryDirectory() as folder, tabular.reproducible("cpu", params.threads):
        data, job = training_job(Path(folder), pack, {}, part)
        prepared = tabular.Prepared.of(data, params, "cpu")
        features, rows, held = prepared.features, prepared.rows, prepared.held
        print(
            f"torch {torch.__version__}, {params.threads} threads, {len(rows)} rows, "
            f"{len(features)} features, batches of {params.batch_size}, {params.members} members of {params.hidden}"
        )
        speeds = []
        for _ in range(arguments.rounds + 1):
            network = tabular.Network(features, 1, params)
            bare = by_index(rows, params.batch_size)
            loader = DataLoader(TensorDataset(rows.positions, rows.target), batch_size=params.batch_size, shuffle=True)
            speeds.append((trainer(network, rows, held, params, job), loop(network, bare), loop(network, loader)))
    found = np.array(speeds[1:])  # the first round warms up
    for name, speed in zip(("trainer", "bare", "loader"), np.median(found, axis=0), strict=True):
        print(f"{name:10}{speed:12,.0f} samples/s")
    to_bare, to_loader = np.median(found[:, :1] / found[:, 1:], axis=0)
    print(f"trainer / bare {to_bare:.2f}, trainer / loader {to_loader:.2f}")
    reached = to_bare >= GOAL
    print(f"goal: at least {GOAL} of the bare loop: {'reached' if reached else 'MISSED'}")
    return 0 if reached else 1


def trainer(
    network: tabular.Network, rows: tabular.Rows, held: tabular.Rows, params: tabular.Params, job: Job
) -> float:
    """Samples per second of one epoch of `tabular.fit`, from its own report."""
    for file in (job.folder / "checkpoint").glob("*"):
        file.unlink()
    tabular.fit(network, rows, held, params, job)
    return job.metrics["samples_per_s"]


def loop(network: tabular.Network, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Samples per second of a plain training loop over the batches."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2, fused=True)
    started, seen = time.perf_counter(), 0
    for positions, target in batches:
        optimizer.zero_grad()
        outputs = network(positions).squeeze(-1)
        torch.nn.functional.binary_cross_entropy_with_logits(outputs, target.expand_as(outputs)).backward()
        optimizer.step()
        seen += len(target)
    return seen / (time.perf_counter() - started)


def by_index(rows: tabular.Rows, batch_size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    for chosen in torch.randperm(len(rows)).split(batch_size):
        yield rows.positions[chosen], rows.target[chosen]


if __name__ == "__main__":
    sys.exit(main())
