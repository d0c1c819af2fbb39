"""The built-in trainer for tables: `tabular.train(data, job)`. Numbers, categories and missing values as they come.

Every feature becomes a place among rows of one table of embeddings (`tabular_loader` says how, and serves the model):
a category has a row of its own, a number is interpolated between rows at its quantiles, which makes it a learned
piecewise-linear function (Gorishniy et al. 2022, "On Embeddings for Numerical Features in Tabular Deep Learning").
On top, `members` small networks share the table, are trained side by side in the same matrix products, each on its
own loss, and are averaged when predicting (after Gorishniy et al. 2025, "TabM", without its shared weights).

The encoded rows stay on the device as one tensor, and a batch is an index into it. On a GPU the products are in
bfloat16, and a long training is compiled. The same seed on the same machine gives the same bytes: algorithms are
deterministic, the number of threads is fixed, and what is random in an epoch depends on seed and epoch alone, so that
a training that was killed and resumed from its checkpoint ends as an undisturbed one would.

Not here: columns that hold instants (turn them into numbers first), data larger than the device's memory.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn import functional

from evergreen.columns import series
from evergreen.errors import TrainingError, nearest
from evergreen.training import tabular_loader
from evergreen.training.tabular_loader import UNSEEN, encode, first_rows, rows_at_once, rows_of

if TYPE_CHECKING:
    import polars as pl

    from evergreen.training.jobs import Job, TrainingData

REPORT_EVERY = 16
"""Batches between two reports: each makes a GPU wait for the loss."""

COMPILE_FROM_BATCHES = 2000
"""Compiling takes about half a minute: shorter trainings are over sooner without."""

ROWS_AT_ONCE = 16384
"""Most rows of a window that are encoded, or scored, together."""


REQUIREMENTS = ("numpy", "pandas", "safetensors")
"""Of the model folder: what `tabular_loader` imports."""


class Params(BaseModel):
    """`training.params` of a pack that uses this trainer. The defaults suit 10 thousand to a few million rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=5, ge=1)
    """The most passes over the training rows; the learning rate falls to zero over as many."""
    patience: int = Field(default=2, ge=1)
    """Stop after so many epochs without a lower validation loss."""
    batch_size: int = Field(default=1024, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    """The highest, after a fifth of the epochs."""
    weight_decay: float = Field(default=1e-2, ge=0)
    hidden: tuple[int, ...] = (64,)
    """Width of each hidden layer of each member."""
    members: int = Field(default=4, ge=1)
    """Networks whose predictions are averaged."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    embedding: int = Field(default=8, ge=1)
    """Numbers that stand for each feature."""
    bins: int = Field(default=8, ge=1)
    """Quantile intervals of a numeric feature."""
    min_count: int = Field(default=20, ge=1)
    """A category that is rarer in the training window is taken as unseen."""
    threads: int = Field(default=1, ge=1)
    """On the CPU. Fixed, since sums depend on how they are split: another number makes another model. More pays with
    wide networks on idle cores; on busy ones threads wait for one another, and one alone is faster."""

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Params:
        """Checked params. Raises TrainingError naming the wrong one, with the nearest that exists."""
        try:
            return cls.model_validate(dict(params))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            if first["type"] == "extra_forbidden":
                raise TrainingError(
                    f"training.params: {name!r} is not a parameter of the tabular trainer",
                    fix=nearest(name, cls.model_fields),
                ) from error
            raise TrainingError(
                f"training.params.{name}: {first['input']!r}: {first['msg']}", fix=f"change {name}, or leave it out"
            ) from error


def train(data: TrainingData, job: Job, *, drop: Sequence[str] = ()) -> None:
    """Train on every column but the target, the event time and those in `drop`; leave the model in `job.model_dir`.

    A binary target is a bool or 0 and 1, a multiclass one anything with equality, a regression one a number. Raises
    TrainingError for wrong params, a target with nulls or a single value, a column it cannot take, and a loss that is
    not finite.
    """
    params = Params.of(job.params)
    prepared = Prepared.of(data, params, job.device, drop)
    job.describe(
        inputs=[feature["name"] for feature in prepared.features],
        requirements=REQUIREMENTS,
        classes=prepared.target.classes if data.task == "multiclass" else None,
    )
    with reproducible(job.device, params.threads):
        torch.manual_seed(job.seed)
        network = Network(prepared.features, prepared.target.outputs, params).to(job.device)
        fit(network, prepared.rows, prepared.held, params, job)
    shutil.copyfile(Path(tabular_loader.__file__), job.model_dir / "loader.py")
    save_file(network.export(), job.model_dir / "weights.safetensors")
    preprocessing = {
        "task": data.task,
        "classes": prepared.target.classes,
        "target": {"mean": prepared.target.mean, "scale": prepared.target.scale},
        "features": prepared.features,
        "trained_with": {"torch": torch.__version__, "device": job.device, "threads": params.threads},
    }
    text = json.dumps(preprocessing, indent=1) + "\n"
    (job.model_dir / "preprocessing.json").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Prepared:
    """The windows as tensors on the device, and what made them so."""

    features: list[dict[str, Any]]
    """As `tabular_loader.encode` takes them."""
    target: Target
    rows: Rows
    """Of the training window."""
    held: Rows
    """Of the validation window."""

    @classmethod
    def of(cls, data: TrainingData, params: Params, device: str, drop: Sequence[str] = ()) -> Prepared:
        """Vocabularies, knots and scale are from the training window alone. Raises TrainingError as `train` does."""
        columns = _columns(data, drop)
        target = Target.of(data)
        features = [_feature(name, series(data.train, name), params) for name in columns]
        rows, held = (
            Rows.of(
                _encoded(window, features),
                target.encode(series(window, data.target)),
                target.task,
                device,
            )
            for window in (data.train, data.validation)
        )
        return cls(features=features, target=target, rows=rows, held=held)


def _encoded(window: pl.DataFrame, features: Sequence[Mapping[str, Any]]) -> NDArray[np.float32]:
    """The rows as `tabular_loader.encode` gives them, some at a time: a second frame of a wide window may not fit."""
    names = [str(feature["name"]) for feature in features]
    at_once = rows_at_once(len(features), ROWS_AT_ONCE)
    parts = [
        encode(window[start : start + at_once][names].to_pandas(), features)
        for start in range(0, window.height, at_once)
    ]
    return np.concatenate(parts) if parts else np.empty((0, len(features)), dtype=np.float32)


@dataclass(frozen=True)
class Target:
    """How the target column becomes what the network is trained on, and back."""

    task: str
    classes: list[Any]
    """Of a multiclass target, sorted."""
    mean: float = 0.0
    scale: float = 1.0
    """Of a regression target."""

    @classmethod
    def of(cls, data: TrainingData) -> Target:
        """From the training window. Raises TrainingError for nulls in either window and for a single value."""
        for window, rows in (("training", data.train), ("validation", data.validation)):
            _check_target(rows, window, data)
        labels = series(data.train, data.target)
        if data.task == "multiclass":
            return cls(task="multiclass", classes=labels.unique().sort().to_list())
        if data.task == "binary":
            return cls(task="binary", classes=[])
        numbers = labels.to_numpy().astype(np.float64)
        return cls(task="regression", classes=[], mean=float(numbers.mean()), scale=float(numbers.std()))

    @property
    def outputs(self) -> int:
        """How many numbers the network gives for a row."""
        return len(self.classes) if self.task == "multiclass" else 1

    def encode(self, values: pl.Series) -> NDArray[np.float32]:
        """0 or 1, a class's index, or the standardised value, for each row; -1 for a class not in the training window."""
        if self.task == "multiclass":
            index = {value: position for position, value in enumerate(self.classes)}
            return np.array([index.get(value, -1) for value in values.to_list()], dtype=np.float32)
        numbers = values.to_numpy().astype(np.float64)
        return ((numbers - self.mean) / self.scale).astype(np.float32)


@dataclass(frozen=True)
class Rows:
    """Encoded rows, resident on the device."""

    positions: Tensor
    """(n, features) float; see `tabular_loader.encode`."""
    target: Tensor
    """(n,) float; for multiclass int64."""
    task: str

    @classmethod
    def of(cls, positions: NDArray[np.float32], target: NDArray[np.float32], task: str, device: str) -> Rows:
        """On `device`. Rows of a class that training has not seen are left out: no loss is defined for them."""
        known = target >= 0 if task == "multiclass" else np.full(len(target), fill_value=True)
        wanted = torch.from_numpy(target[known]).to(device)
        return cls(
            positions=torch.from_numpy(positions[known]).to(device),
            target=wanted.long() if task == "multiclass" else wanted,
            task=task,
        )

    def __len__(self) -> int:
        return len(self.target)


class Network(nn.Module):
    """The table and the members on top of it. positions (n, features) → outputs (members, n, outputs)."""

    first_rows: Tensor

    def __init__(self, features: Sequence[Mapping[str, Any]], outputs: int, params: Params) -> None:
        super().__init__()
        self.dropout = params.dropout
        self.register_buffer("first_rows", torch.from_numpy(first_rows(features)), persistent=False)
        # One row more than there are: a value at the very last row is interpolated with weight 0 towards the next.
        rows = [_initial_rows(feature, params.embedding) for feature in features]
        self.table = nn.Parameter(torch.cat([*rows, torch.zeros(1, params.embedding)]))
        widths = [len(features) * params.embedding, *params.hidden]
        self.weights = nn.ParameterList(
            _uniform(params.members, before, after) for before, after in itertools.pairwise(widths)
        )
        self.biases = nn.ParameterList(torch.zeros(params.members, 1, width) for width in params.hidden)
        self.output_weight = nn.Parameter(_uniform(params.members, widths[-1], outputs))
        self.output_bias = nn.Parameter(torch.zeros(params.members, 1, outputs))

    def forward(self, positions: Tensor) -> Tensor:
        low = positions.floor()
        rows = low.long() + self.first_rows
        low_rows, high_rows = functional.embedding(rows, self.table), functional.embedding(rows + 1, self.table)
        members = torch.lerp(low_rows, high_rows, (positions - low)[..., None]).flatten(1)[None]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            members = functional.dropout(torch.relu(_product(members, weight) + bias), self.dropout, self.training)
        return _product(members, self.output_weight) + self.output_bias

    def export(self) -> dict[str, NDArray[np.float32]]:
        """The weights by the names that `tabular_loader` reads."""
        named = {
            "table": self.table,
            "output.weight": self.output_weight,
            "output.bias": self.output_bias,
            **{f"hidden.{layer}.weight": weight for layer, weight in enumerate(self.weights)},
            **{f"hidden.{layer}.bias": bias for layer, bias in enumerate(self.biases)},
        }
        return {name: tensor.detach().cpu().numpy() for name, tensor in named.items()}


def fit(network: Network, rows: Rows, held: Rows, params: Params, job: Job) -> None:
    """Train `network` on `rows`; it ends with the weights of the epoch that had the lowest loss on `held`."""
    batches = math.ceil(len(rows) / params.batch_size)
    of = params.epochs * batches
    optimizer = AdamW(network, params.weight_decay)
    kept = Kept.resumed(optimizer, job)
    forward = torch.compile(network) if job.device == "cuda" and of >= COMPILE_FROM_BATCHES else network
    for epoch in range(kept.epochs, params.epochs):
        if epoch - kept.best_epoch > params.patience:
            break
        torch.manual_seed(job.seed * 1_000_003 + epoch)
        network.train()
        total, seen, started = torch.zeros((), device=job.device), 0, time.perf_counter()
        order = torch.randperm(len(rows), device=job.device)
        for batch, chosen in enumerate(torch.split(order, params.batch_size), start=epoch * batches):
            with torch.autocast("cuda", torch.bfloat16, enabled=job.device == "cuda"):
                outputs = forward(rows.positions[chosen])
            loss = loss_of(outputs.float(), rows.target[chosen], rows.task)
            torch.autograd.backward(loss)
            optimizer.step(params.learning_rate * schedule(batch / of))
            total += loss.detach() * len(chosen)
            seen += len(chosen)
            if batch % REPORT_EVERY == 0 and seen < len(rows):
                job.progress(batch + 1, of, loss=float(total) / seen)
        mean_loss = float(total) / seen
        if not math.isfinite(mean_loss):
            job.progress((epoch + 1) * batches, of, loss=mean_loss)  # refuses it
        samples_per_s = seen / (time.perf_counter() - started)
        metrics = {"loss": mean_loss, **validate(network, held), "samples_per_s": samples_per_s}
        job.progress((epoch + 1) * batches, of, **metrics)
        kept.add(epoch, metrics, optimizer, job)
    optimizer.weights.copy_(kept.best)
    job.progress(of, of, **kept.metrics)


def validate(network: Network, held: Rows) -> dict[str, float]:
    """Loss and a metric of the averaged predictions on the validation rows: roc_auc, accuracy or r2 by the task.

    roc_auc is absent where only one class is there.
    """
    network.eval()
    with torch.no_grad():
        outputs = (
            torch.cat(
                [
                    network(part)
                    for part in torch.split(
                        held.positions, rows_at_once(network.table.shape[1] * held.positions.shape[1], ROWS_AT_ONCE)
                    )
                ],
                dim=1,
            )
            .double()
            .cpu()
            .numpy()
        )
    truth = held.target.cpu().numpy()
    if held.task == "multiclass":
        predicted = tabular_loader.softmax(outputs).mean(axis=0)
        loss = -np.log(np.clip(predicted[np.arange(len(truth)), truth], 1e-15, None)).mean()
        metric = {"validation_accuracy": float((predicted.argmax(axis=1) == truth).mean())}
    elif held.task == "binary":
        predicted = tabular_loader.sigmoid(outputs[..., 0]).mean(axis=0)
        right = np.clip(np.where(truth > 0.5, predicted, 1 - predicted), 1e-15, None)
        loss = -np.log(right).mean()
        metric = {"validation_roc_auc": roc_auc(truth, predicted)} if 0 < truth.mean() < 1 else {}
    else:
        predicted = outputs[..., 0].mean(axis=0)
        loss = np.square(predicted - truth).mean()
        metric = {"validation_r2": float(1 - loss / max(truth.var(), 1e-15))}
    return {"validation_loss": float(loss), **metric}


def roc_auc(truth: NDArray[Any], predicted: NDArray[Any]) -> float:
    """Area under the ROC curve by the Mann-Whitney statistic, ties at half; `truth` (n,) is 0 or 1, both there."""
    _, place, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    positive = truth > 0.5
    ones = int(positive.sum())
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * (len(truth) - ones)))


@contextmanager
def reproducible(device: str, threads: int) -> Iterator[None]:
    """Deterministic algorithms and so many threads, within; afterwards all is as it was, the random state included."""
    before = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device == "cuda" else []):
        try:
            torch.set_num_threads(threads)
            # What use_deterministic_algorithms(True) does, without its import of the compiler, which takes 1.4 s.
            torch.set_deterministic_debug_mode("error")
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.set_deterministic_debug_mode(before[1])


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), over all weights as one vector.

    Not torch.optim's, whose first use imports torch's compiler, which takes longer than many a training; the tests
    hold the two together. `step` wants the gradients in place and leaves them at zero.
    """

    def __init__(self, network: nn.Module, weight_decay: float) -> None:
        parameters = list(network.parameters())
        self.weights = torch.cat([parameter.detach().flatten() for parameter in parameters])
        self.gradient, self.mean, self.square = (torch.zeros_like(self.weights) for _ in range(3))
        self.steps = 0
        self.weight_decay = weight_decay
        start = 0
        for parameter in parameters:  # from here on each is a view of the vector
            end = start + parameter.numel()
            parameter.data = self.weights[start:end].view_as(parameter)
            parameter.grad = self.gradient[start:end].view_as(parameter)
            start = end

    def step(self, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8) -> None:
        """Move the weights against the gradient."""
        self.steps += 1
        self.mean.lerp_(self.gradient, 1 - betas[0])
        self.square.mul_(betas[1]).addcmul_(self.gradient, self.gradient, value=1 - betas[1])
        root = (self.square / (1 - betas[1] ** self.steps)).sqrt_().add_(epsilon)
        self.weights.mul_(1 - learning_rate * self.weight_decay)
        self.weights.addcdiv_(self.mean, root, value=-learning_rate / (1 - betas[0] ** self.steps))
        self.gradient.zero_()


@dataclass
class Kept:
    """What outlives a kill, beside the weights and the optimizer's memory of them: the epochs done, and the best."""

    best: Tensor
    """Weights of the best epoch."""
    epochs: int = 0
    best_epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the best epoch."""

    @classmethod
    def resumed(cls, optimizer: AdamW, job: Job) -> Kept:
        """From the job's checkpoint, with the optimizer set to it; from the beginning where there is none."""
        found = job.checkpoint.load()
        if found is None:
            return cls(best=optimizer.weights.clone())
        epochs, tensors, state = found
        for name in ("weights", "mean", "square"):
            getattr(optimizer, name).copy_(tensors[name])
        optimizer.steps = state["steps"]
        best = tensors["best"].to(job.device)
        return cls(best=best, epochs=epochs, best_epoch=state["best_epoch"], metrics=state["metrics"])

    def add(self, epoch: int, metrics: dict[str, float], optimizer: AdamW, job: Job) -> None:
        """Take note of an epoch that is done, and write the checkpoint."""
        self.epochs = epoch + 1
        if not self.metrics or metrics["validation_loss"] < self.metrics["validation_loss"]:
            self.best_epoch, self.metrics, self.best = epoch, metrics, optimizer.weights.clone()
        job.checkpoint.save(
            self.epochs,
            {name: getattr(optimizer, name) for name in ("weights", "mean", "square")} | {"best": self.best},
            {"steps": optimizer.steps, "best_epoch": self.best_epoch, "metrics": self.metrics},
        )


def schedule(done: float) -> float:
    """Share of the highest learning rate when this share of the steps is done: up in a fifth, then down by a cosine."""
    if done < 0.2:
        return 0.04 + 0.96 * done / 0.2
    return 0.5 * (1 + math.cos(math.pi * (done - 0.2) / 0.8))


def loss_of(outputs: Tensor, target: Tensor, task: str) -> Tensor:
    """The mean over members and rows: each member learns for itself."""
    if task == "multiclass":
        return functional.cross_entropy(outputs.flatten(0, 1), target.repeat(len(outputs)))
    values = outputs.squeeze(-1)
    wanted = target.expand_as(values)
    if task == "binary":
        return functional.binary_cross_entropy_with_logits(values, wanted)
    return functional.mse_loss(values, wanted)


def _product(members: Tensor, weight: Tensor) -> Tensor:
    """(1 or members, n, before) times (members, before, after) → (members, n, after).

    What all members share, (1, n, before), is multiplied once with the weights side by side: one large product.
    """
    if len(members) == len(weight):
        return torch.bmm(members, weight)
    count, before, after = weight.shape
    side_by_side = members[0] @ weight.transpose(0, 1).reshape(before, count * after)
    return side_by_side.view(-1, count, after).transpose(0, 1)


def _uniform(members: int, before: int, after: int) -> Tensor:
    return (torch.rand(members, before, after) * 2 - 1) / math.sqrt(before)


def _initial_rows(feature: Mapping[str, Any], width: int) -> Tensor:
    """A category's rows are random; a number's lie on a line, so that it enters as its rank and bends from there."""
    spread = 0.5 / math.sqrt(width)
    if feature["kind"] == "category":
        return torch.randn(rows_of(feature), width) * spread
    ranks = torch.linspace(-(3**0.5), 3**0.5, len(feature["knots"]))
    return torch.cat([torch.zeros(1, width), ranks[:, None] * torch.randn(1, width) * spread])


def _columns(data: TrainingData, drop: Sequence[str]) -> list[str]:
    """The features. Raises TrainingError for a dropped one that is not there, and for one of a type it cannot take."""
    import polars as pl

    for name in drop:
        if name not in data.features:
            raise TrainingError(
                f"tabular.train(drop=…): there is no feature {name!r}", fix=nearest(name, data.features)
            )
    columns = [name for name in data.features if name not in drop]
    for name in columns:
        kind = data.train.schema[name]
        if not (kind.is_numeric() or kind in (pl.String, pl.Boolean, pl.Categorical, pl.Enum, pl.Null)):
            raise TrainingError(
                f"the column {name!r} holds {kind}, which the tabular trainer cannot take",
                fix=f"turn it into numbers or text where the rows are read, or call tabular.train(…, drop=[{name!r}])",
            )
    if not columns:
        raise TrainingError("the data has no feature: every column is dropped", fix="leave tabular.train some columns")
    return columns


def _feature(name: str, series: pl.Series, params: Params) -> dict[str, Any]:
    """What `tabular_loader.encode` needs to know of a column, from its training rows."""
    import polars as pl

    if series.dtype in (pl.String, pl.Categorical, pl.Enum):
        counts = series.cast(pl.String).drop_nulls().rename("value").value_counts(name="rows")
        common = counts.filter(pl.col("rows") >= params.min_count).sort(["rows", "value"], descending=[True, False])
        vocabulary = {value: row for row, value in enumerate(common["value"].to_list(), start=UNSEEN + 1)}
        return {"name": name, "kind": "category", "vocabulary": vocabulary}
    numbers = series.cast(pl.Float64).drop_nulls().to_numpy()
    numbers = numbers[np.isfinite(numbers)]
    knots = np.unique(np.quantile(numbers, np.linspace(0, 1, params.bins + 1))) if len(numbers) else np.zeros(1)
    return {"name": name, "kind": "number", "knots": knots.tolist()}


def _check_target(rows: pl.DataFrame, window: str, data: TrainingData) -> None:
    """Raises TrainingError where the target is null, not of its task, or, in the training window, always the same."""
    labels = series(rows, data.target)
    times = series(rows, data.event_time)
    where = f"{data.target!r} in the {window} window ({times.min()!s} … {times.max()!s}, {rows.height} rows)"
    numeric = data.task != "multiclass"
    if numeric and not (labels.dtype.is_numeric() or str(labels.dtype) == "Boolean"):
        raise TrainingError(
            f"{where} holds {labels.dtype}, and data.task is {data.task}",
            fix="make it a number (0 and 1, or a bool, for binary), or write data.task: multiclass",
        )
    empty = labels.null_count() + (int((~labels.is_finite()).sum()) if labels.dtype.is_float() else 0)
    if empty:
        raise TrainingError(
            f"{where} has {empty} without a value",
            fix="leave such rows out where they are read, or expect_column_values_to_not_be_null of it",
        )
    if window == "training" and labels.n_unique() < 2:
        only = f"{labels.to_list()[0]!r} in all" if rows.height else "nothing"
        raise TrainingError(f"{where} holds {only}: there is nothing to tell apart", fix="make data.train longer")
    if data.task == "binary" and not set(labels.unique().to_list()) <= {0, 1}:
        found = labels.rename("value").value_counts(sort=True).head(5).rows()
        raise TrainingError(
            f"{where} holds {', '.join(f'{value!r} ({count} times)' for value, count in found)}, and data.task is binary",
            fix="make it 0 and 1, or a bool, or write data.task: multiclass",
        )
