"""The script that MLflow keeps beside a model folder and runs to load it: nothing of Evergreen is needed there.

A registered version holds this file and the model folder. `mlflow.pyfunc.load_model` runs it, and it hands on to the
folder's own `loader.py`: `load(folder) -> model`, `model.predict(frame: pandas.DataFrame) -> array`.
"""

from __future__ import annotations

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
        # A name of its own for every load, so that two versions can live in one process.
        name = f"model_folder_{uuid.uuid4().hex}"
        loader = SourceFileLoader(name, str(folder / "loader.py"))
        spec = spec_from_loader(name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        sys.modules[name] = module
        # Compiled from the source here: no bytecode of a cache is trusted, and none is left in the hashed folder.
        exec(loader.source_to_code(loader.get_data(loader.path), loader.path), module.__dict__)  # noqa: S102
        self.model = module.load(folder)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:  # noqa: ARG002
        """The model's predictions for raw rows."""
        return self.model.predict(model_input)


set_model(ModelFolder())
