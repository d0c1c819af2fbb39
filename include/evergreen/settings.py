"""Where things live. One frozen value, read from the environment once, handed on from there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from evergreen.errors import SettingsError

PREFIX = "EVERGREEN_"


class Settings(BaseModel):
    """Places and addresses. Every field but `home` has a default under `home`; nothing here makes a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path
    """The embedded home: all that is not in the project or in a service of its own lives under it."""
    packs: Path
    """The folder whose sub-folders are packs."""
    project: Path
    """The project's root: its git revision and its lock file are part of every run's lineage."""
    database_url: str
    """The events database: any SQLAlchemy URL."""
    data_repository: str
    """Git repository of the snapshots: a path or any URL git pushes to."""
    data_remote: str
    """DVC remote of the store: a path or any URL DVC knows (s3://, gs://, ssh://, …)."""
    cache: Path
    """This machine's cache: DVC objects and a clone of `data_repository`. May vanish between two stages."""
    jobs: Path
    """This machine's job folders. Outlive the Airflow task that started them."""
    mlflow_tracking_uri: str
    """MLflow server or database."""
    mlflow_artifacts: str
    """Artifact root of experiments that Evergreen makes, for a database tracking URI; a server has its own."""
    senders: Path
    """Who may send alerts, and by which secrets: a YAML file that only its owner can read."""
    url: str | None = None
    """Airflow's API server, where alerts are sent; None: the one that runs on this home."""
    image: str | None = None
    """Evergreen's container image, by digest: what this process runs in, when it does, and what jobs can run in."""
    revision: str | None = None
    """The project's git revision, where its files are in an image and git cannot be asked; `-dirty` if they differ."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings from `EVERGREEN_<FIELD>` variables, defaults elsewhere.

        `EVERGREEN_PROJECT` defaults to the folder above `include/` of this installation, `EVERGREEN_HOME` to
        `<project>/var`. Raises SettingsError for a home whose path SQLite databases cannot lie in.
        """
        env = os.environ if environ is None else environ

        def get(name: str, default: str) -> str:
            return env.get(PREFIX + name) or default

        project = Path(get("PROJECT", str(Path(__file__).resolve().parents[2]))).absolute()
        home = Path(get("HOME", str(project / "var"))).absolute()
        if "?" in str(home):  # ends the path in a database URL: another file would be the database
            raise SettingsError(
                f"the home {home} has a question mark in its path",
                fix="set EVERGREEN_HOME to a folder whose path has none",
            )
        return cls(
            home=home,
            project=project,
            packs=Path(get("PACKS", str(project / "include" / "packs"))).absolute(),
            database_url=get("DATABASE_URL", f"sqlite:///{home / 'evergreen.db'}"),
            data_repository=get("DATA_REPOSITORY", str(home / "data")),
            data_remote=get("DATA_REMOTE", str(home / "remote")),
            cache=Path(get("CACHE", str(home / "cache"))).absolute(),
            jobs=Path(get("JOBS", str(home / "jobs"))).absolute(),
            mlflow_tracking_uri=env.get(PREFIX + "MLFLOW_TRACKING_URI")
            or env.get("MLFLOW_TRACKING_URI")
            or f"sqlite:///{home / 'mlflow.db'}",
            mlflow_artifacts=get("MLFLOW_ARTIFACTS", str(home / "mlartifacts")),
            senders=Path(get("SENDERS", str(home / "senders.yaml"))).absolute(),
            url=env.get(PREFIX + "URL") or None,
            image=env.get(PREFIX + "IMAGE") or None,
            revision=env.get(PREFIX + "REVISION") or None,
        )
