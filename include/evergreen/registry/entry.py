"""The script that MLflow keeps beside a model folder and runs to load it: nothing of Evergreen is needed there.

A registered version holds this file, the model folder and `conversion.py`. `mlflow.pyfunc.load_model` runs this file. It
converts the rows to the types that the folder's `model.json` declares, and hands them to the folder's own `loader.py`:
`load(folder) -> model`, `model.predict(frame: pandas.DataFrame) -> array`.
"""

from __future__ import annotations

import json
import sys
import uuid
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class ModelFolder(PythonModel):  # type: ignore[misc]
    """The model in the version's folder."""

    def load_context(self, context: Any) -> None:
        """Run the folder's `loader.py` and keep what its `load` returns."""
        folder = Path(context.artifacts["model"])
        self.described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.conversion = _module(Path(context.artifacts["conversion"]))
        self.model = _module(folder / "loader.py").load(folder)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:  # noqa: ARG002
        """The model's predictions for raw rows."""
        return self.model.predict(self.conversion.convert(model_input, self.described))


def _module(file: Path) -> Any:
    # A name of its own for every load, so that two versions can live in one process.
    name = f"{file.stem}_{uuid.uuid4().hex}"
    loader = SourceFileLoader(name, str(file))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    # Compiled from the source here: no bytecode of a cache is trusted, and none is left in the hashed folder.
    exec(loader.source_to_code(loader.get_data(loader.path), loader.path), module.__dict__)  # noqa: S102
    return module


set_model(ModelFolder())
