"""A model of the built-in tabular trainer, predicting from raw columns: numpy, pandas and safetensors, nothing else.

The trainer copies this file into the model folder as `loader.py`, beside `weights.safetensors` and
`preprocessing.json`, and encodes its own rows with it, so that training and serving cannot see a row differently.

Every feature has rows in one table of embeddings. A category is one of its feature's rows; a number lies between two
of them and is interpolated. The first row of each feature stands for a missing value; a category's second one for
all values not in its vocabulary. What the table gives for each feature is joined and fed to an ensemble of small
networks, whose predictions are averaged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file

Floats = NDArray[np.float32]

MISSING = 0
UNSEEN = 1
ROWS_AT_ONCE = 8192
NUMBERS_AT_ONCE = 2**24
"""Both bound the memory of a prediction, whatever the number of rows and of columns."""


def load(folder: str | Path) -> Tabular:
    """The model in `folder`."""
    preprocessing = json.loads((Path(folder) / "preprocessing.json").read_text(encoding="utf-8"))
    return Tabular(preprocessing, load_file(Path(folder) / "weights.safetensors"))


class Tabular:
    """A trained model. `predict(frame)` takes raw columns; others than it knows are ignored."""

    def __init__(self, preprocessing: Mapping[str, Any], weights: Mapping[str, Floats]) -> None:
        self.task: str = preprocessing["task"]
        self.classes: list[Any] = preprocessing["classes"]
        """The classes of a multiclass target, in the order of the predicted columns."""
        self.target: Mapping[str, float] = preprocessing["target"]
        self.features: list[Mapping[str, Any]] = preprocessing["features"]
        self.first_rows = first_rows(self.features)
        self.weights = weights
        self.hidden_layers = sum(name.startswith("hidden") for name in weights) // 2

    def predict(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """One prediction for each row of `frame`, which is left as it is.

        The probability of the positive class (n,), of each class (n, k), or the value (n,), by the task. Raises
        ValueError for a column that is missing, or that holds text where the model was trained on numbers.
        """
        positions = encode(frame, self.features)
        at_once = rows_at_once(len(self.features) * self.weights["table"].shape[1], ROWS_AT_ONCE)
        parts = [
            self._predict(positions[start : start + at_once]) for start in range(0, max(len(positions), 1), at_once)
        ]
        return np.concatenate(parts)

    def _predict(self, positions: Floats) -> NDArray[np.float64]:
        """Predictions for encoded rows."""
        low = np.floor(positions).astype(np.int64)
        between = (positions - low)[..., None]
        rows = low + self.first_rows
        table = self.weights["table"]
        embedded = table[rows] * (1 - between) + table[rows + 1] * between
        members = embedded.reshape(1, len(positions), table.shape[1] * len(self.features))
        for layer in range(self.hidden_layers):
            weight, bias = self.weights[f"hidden.{layer}.weight"], self.weights[f"hidden.{layer}.bias"]
            members = np.maximum(members @ weight + bias, 0)
        outputs = (members @ self.weights["output.weight"] + self.weights["output.bias"]).astype(np.float64)
        if self.task == "multiclass":
            return np.asarray(softmax(outputs).mean(axis=0))
        if self.task == "binary":
            return np.asarray(sigmoid(outputs[..., 0]).mean(axis=0))
        return np.asarray(outputs[..., 0].mean(axis=0) * self.target["scale"] + self.target["mean"])


def rows_at_once(width: int, most: int) -> int:
    """How many rows of `width` numbers each to take together, at most `most`."""
    return max(1, min(most, NUMBERS_AT_ONCE // max(width, 1)))


def first_rows(features: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
    """The table row at which each feature's rows begin, and none for the end; see `rows_of`."""
    return np.cumsum([0, *(rows_of(feature) for feature in features)])[:-1]


def rows_of(feature: Mapping[str, Any]) -> int:
    """How many rows of the table are the feature's."""
    if feature["kind"] == "number":
        return 1 + len(feature["knots"])
    return 2 + len(feature["vocabulary"])


def encode(frame: pd.DataFrame, features: Sequence[Mapping[str, Any]]) -> Floats:
    """Where each value lies among its feature's rows (n, features): a whole number for a category or a missing value.

    A number is placed by linear interpolation between the feature's knots; beyond the outermost, at them.
    """
    missing = [feature["name"] for feature in features if feature["name"] not in frame.columns]
    if missing:
        raise ValueError(
            f"the column {missing[0]!r} is missing"
            + (f", and {len(missing) - 1} more: {', '.join(missing[1:5])}" if missing[1:] else "")
            + f"; the model takes {', '.join(feature['name'] for feature in features)}"
        )
    positions = np.empty((len(frame), len(features)), dtype=np.float32)
    for column, feature in enumerate(features):
        values = frame[feature["name"]]
        if feature["kind"] == "number":
            positions[:, column] = _places(_numbers(values, feature["name"]), feature["knots"])
        else:
            positions[:, column] = _known(values, feature["vocabulary"])
    return positions


def _places(numbers: NDArray[np.float64], knots: Sequence[float]) -> NDArray[np.float64]:
    placed = 1 + np.interp(numbers, knots, np.arange(len(knots), dtype=np.float64))
    return np.where(np.isnan(numbers), float(MISSING), placed)


def _numbers(values: pd.Series[Any], name: str) -> NDArray[np.float64]:
    try:
        return np.asarray(values.to_numpy(dtype=np.float64, na_value=np.nan))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the column {name!r} should hold numbers: {error}") from None


def _known(values: pd.Series[Any], vocabulary: Mapping[str, int]) -> NDArray[np.float64]:
    found = [vocabulary.get(str(value), UNSEEN) for value in values.tolist()]
    return np.where(values.isna().to_numpy(), MISSING, found).astype(np.float64)


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + e^-x), without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits)))


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """e^x over its sum along the last axis, without overflow."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
