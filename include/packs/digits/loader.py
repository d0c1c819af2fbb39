"""The digits model, from its folder: a matrix, a bias and a softmax. Copied into every model folder by `train`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file


def load(folder: str | Path) -> Digits:
    """The model in `folder`."""
    return Digits(Path(folder))


class Digits:
    """`predict(frame)` takes the 64 pixel columns, 0 to 16; a missing value counts as no ink."""

    def __init__(self, folder: Path) -> None:
        described = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        self.classes: list[int] = described["classes"]
        self.pixels: list[str] = described["pixels"]
        weights = load_file(folder / "weights.safetensors")
        self.weight, self.bias = weights["weight"], weights["bias"]

    def predict(self, frame: pd.DataFrame) -> np.ndarray:
        """Probabilities (n, classes), in the order of `classes`. Raises ValueError for a missing column."""
        missing = [name for name in self.pixels if name not in frame.columns]
        if missing:
            raise ValueError(f"the column {missing[0]!r} is missing; the model takes {', '.join(self.pixels)}")
        # Column by column: to take all at once, pandas makes a frame of them first, which costs a single row more.
        columns = [frame[name].array.to_numpy(dtype=np.float64, na_value=np.nan) for name in self.pixels]
        pixels = np.nan_to_num(np.stack(columns, axis=1)) / 16
        logits = pixels @ self.weight + self.bias
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)
