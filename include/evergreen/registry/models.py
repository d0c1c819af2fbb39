"""MLflow: one run and one version for each model folder, with its lineage; aliases; and the way back to the folder.

The only module that imports MLflow, and it does so on first use. It speaks through `MlflowClient` alone: MLflow's
"fluent" calls keep the tracking URI and the active run in process-wide state and environment variables, try the model
out while they log it (which would import torch here), and infer requirements for ten seconds.

Not covered: who may move the alias `champion` and when; that is `promotion.py`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from evergreen import home
from evergreen.errors import RegistryError, nearest
from evergreen.registry.lineage import Lineage, as_tag, flat, unflat
from evergreen.run import Value, Verdict, sayable
from evergreen.settings import Settings

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as MlflowRun
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion
    from mlflow.models import ModelSignature

log = logging.getLogger("evergreen")

ENTRY = Path(__file__).with_name("entry.py")
CONVERSION = Path(__file__).parents[1] / "conversion.py"
"""Stored with each version, for `entry.py` to use where Evergreen is not installed."""
KEY = "evergreen.key"
COMPLETE = "evergreen.complete"
"""The tag written last: a version without it is what a killed registration left, and the next one completes it."""
PRUNED = "evergreen.pruned"
"""The tag that says when, by which rule and why a version's files were removed; what made it is still told."""
REACH_S = 5
"""How long a server or a database may take to accept a connection."""
LONGEST = {"param": 6000, "tag": 5000}
"""Characters. MLflow cuts longer values without a word; here they are replaced by the name of the artifact that has them."""
MODEL_HASH = "evergreen.model_hash"
CHAMPION = "champion"
DELETED_RUN = re.compile(r"Run with id=?'?(\w+)'? not found")
"""MLflow's words about a run that somebody deleted for good, with `mlflow gc`."""
LINEAGE = "lineage.json"
"""The artifact of the MLflow run that holds the whole lineage."""

ON_VERSION = frozenset(
    ["evergreen.run_id", "evergreen.as_of", "evergreen.reason", "evergreen.snapshot.tag", "evergreen.code.revision"]
)
"""What of the lineage a version is tagged with, for people who look at a list of them; its MLflow run has all of it."""


class ModelVersion(Value):
    """One version in the registry, as far as its tags tell; `lineage` of the registry tells the rest."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str | None
    """The MLflow run."""
    tags: dict[str, str]
    model_hash: str | None
    """Hash of the model folder in the store; None for a version that Evergreen did not make."""
    complete: bool
    """False while a registration is under way, or was killed."""
    pruned: str | None = None
    """When, by which rule and why its files were removed; None: they are there."""


class Registry:
    """The MLflow registry of `settings`. Connects on first use, and makes an SQLite database that is not there yet."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.uri = settings.mlflow_tracking_uri
        self.artifacts = settings.mlflow_artifacts

    # -- writing -------------------------------------------------------------------------------------------------

    def register(
        self,
        name: str,
        folder: Path,
        *,
        key: str,
        run_name: str,
        lineage: Lineage,
        model_hash: str,
        metrics: Mapping[str, float],
        curve: Sequence[Mapping[str, Any]],
        artifacts: Mapping[str, Path],
        input_example: pd.DataFrame,
        tags: Mapping[str, str],
        description: str,
    ) -> tuple[int, str]:
        """Make the version of `folder` for `key`, once; return its number and its MLflow run's id.

        `artifacts` maps a path within the run to a file or folder here; `curve` has a `step` in each line. The lineage
        goes on the MLflow run as tags and as the artifact lineage.json, the gist of it on the version. Killed anywhere and called again, there is one
        version for `key` in the end, and no leftover. Two calls for one `key` at once are for the caller's lease to
        prevent. Raises RegistryError.
        """
        own = {**tags, MODEL_HASH: model_hash, KEY: key}
        whole = flat(lineage) | own
        wanted = {name: value for name, value in whole.items() if name in ON_VERSION or name in own}
        with self._explained(f"cannot register {name}"):
            version = self._find(name, key)
            if version is None:
                experiment = self._experiment(name)
                self._clear(experiment, key)
                try:
                    run = self._client.create_run(
                        experiment, run_name=run_name, tags=_fitting(_run_tags(lineage, description) | whole, "tag")
                    )
                    self._log_files(run, artifacts)
                    model = self._log_model(name, folder, run, lineage, input_example)
                    self._log_numbers(model, _params(lineage), metrics, curve)
                    version = self._show(name, model, wanted, description)
                except Exception:
                    # Leave nothing half-visible, unless the version was made after all and only the answer was lost.
                    with contextlib.suppress(Exception):
                        if self._find(name, key) is None:
                            self._clear(experiment, key)
                    raise
            self._complete(version, lineage, wanted)
        return int(version.version), str(version.run_id)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Move `alias` to `version`."""
        self.version(name, version)
        with self._explained(f"cannot move the alias {name}@{alias}"):
            self._client.set_registered_model_alias(name, alias, str(version))

    def drop_alias(self, name: str, alias: str, version: int) -> None:
        """Take `alias` off `version`; nothing happens where it is not on it."""
        if alias in self.version(name, version).aliases:
            with self._explained(f"cannot drop the alias {name}@{alias}"):
                self._client.delete_registered_model_alias(name, alias)

    def tag(self, name: str, version: int, tags: Mapping[str, str]) -> None:
        """Set tags on a version."""
        known = self.version(name, version).tags
        with self._explained(f"cannot tag {name} version {version}"):
            for tag, value in _fitting(tags, "tag").items():
                if known.get(tag) != value:
                    self._client.set_model_version_tag(name, str(version), tag, value)

    def judge(self, name: str, version: int, verdict: Verdict) -> None:
        """Write the gate's verdict on a version: in its lineage.json and as tags."""
        found = self.version(name, version)
        lineage = self.lineage(name, version) | {"verdict": verdict.model_dump(mode="json")}
        with self._explained(f"cannot write the verdict on {name} version {version}"):
            self._client.log_text(found.run_id, sayable(json.dumps(lineage, indent=2, ensure_ascii=False)), LINEAGE)
        self.tag(
            name,
            version,
            {
                "evergreen.verdict.decision": verdict.decision,
                "evergreen.verdict.reasons": as_tag(list(verdict.reasons)),
            },
        )

    def describe(self, name: str, version: int, text: str) -> None:
        """Write what stands beside a version in MLflow's UI, as markdown."""
        self.version(name, version)
        with self._explained(f"cannot describe {name} version {version}"):
            self._client.update_model_version(name, str(version), sayable(text))

    def prune(self, name: str, version: int, why: str) -> None:
        """Remove the files of a version and of its MLflow run but the lineage, for good; done again, it changes nothing.

        The version stays, and says why. First it loses the key by which a run would find it in place of a new one.
        """
        found = self.version(name, version)
        self.tag(name, version, {PRUNED: why})
        with self._explained(f"cannot remove the files of {name} version {version}"):
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            client, run = self._client, self._client.get_run(found.run_id)
            if KEY in found.tags:
                client.delete_model_version_tag(name, str(version), KEY)
            if KEY in run.data.tags:
                client.delete_tag(run.info.run_id, KEY)
            for output in run.outputs.model_outputs:
                place = client.get_logged_model(output.model_id).artifact_location
                get_artifact_repository(place, tracking_uri=self.uri).delete_artifacts()
            files = get_artifact_repository(run.info.artifact_uri, tracking_uri=self.uri)
            for file in files.list_artifacts():
                if file.path != LINEAGE:
                    files.delete_artifacts(file.path)

    def restore(
        self,
        version: ModelVersion,
        folder: Path,
        *,
        lineage: Lineage,
        artifacts: Mapping[str, Path],
        input_example: pd.DataFrame,
    ) -> None:
        """Log the files of a version again, whose artifacts somebody removed; its number, tags and figures stay.

        `folder` is its model folder. Its lineage comes from its tags; `lineage` stands in where those were removed, too.
        """
        with self._explained(f"cannot restore the files of {version.name} version {version.version}"):
            client, run = self._client, self._client.get_run(version.run_id)
            known = unflat({**run.data.tags, **version.tags}) or lineage.model_dump(mode="json")
            self._log_files(run, artifacts)
            for output in run.outputs.model_outputs:
                with _workroom() as room:
                    ids = {"model_id": output.model_id, "run_id": run.info.run_id}
                    _save(room / "model", folder, input_example, **ids)
                    client.log_model_artifacts(output.model_id, str(room / "model"))
            text = json.dumps(known | {"version": version.version}, indent=2, ensure_ascii=False)
            client.log_text(run.info.run_id, sayable(text), LINEAGE)

    # -- reading -------------------------------------------------------------------------------------------------

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of `name`, oldest first; none where there is no such model."""
        with self._explained(f"cannot list the versions of {name}"):
            aliases = self._aliases(name)
            if aliases is None:
                return []
            found: list[MlflowVersion] = []
            token: str | None = None
            while True:
                page = self._client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
                found += page
                token = page.token
                if not token:
                    return sorted((self._value(version, aliases) for version in found), key=lambda one: one.version)

    def version(self, name: str, ref: str | int) -> ModelVersion:
        """The version that `ref`, a number or an alias, names. Raises RegistryError saying what there is instead."""
        with self._explained(f"cannot read {name}@{ref}"):
            aliases = self._aliases(name)
            if aliases is None:
                known = [model.name for model in self._client.search_registered_models(max_results=1000)]
                raise RegistryError(
                    f"{self.shown}: there is no model {name!r}",
                    fix=f"{nearest(name, known)}; or, where it was deleted in MLflow, evergreen run {name} makes it again",
                )
            number = aliases.get(str(ref), str(ref))
            if number.isdecimal():
                found = _unless_missing(lambda: self._client.get_model_version(name, number))
                if found is not None:
                    return self._value(found, aliases)
            numbers = [str(version.version) for version in self.versions(name)]
            shown = ", ".join(["…"] * (len(numbers) > 5) + numbers[-5:]) or "none"
            fix = f"aliases: {', '.join(sorted(aliases)) or 'none'}; versions: {shown}"
            if ref == CHAMPION:
                fix = f"where the alias was taken off by hand: evergreen rollback {name} --why …; {fix}"
            raise RegistryError(f"{self.shown}: {name} has no version or alias {str(ref)!r}", fix=fix)

    def find(self, name: str, key: str) -> ModelVersion | None:
        """The version that was registered for `key`, if it is complete."""
        with self._explained(f"cannot look for a version of {name}"):
            aliases = self._aliases(name)
            found = self._find(name, key) if aliases is not None else None
        version = self._value(found, aliases or {}) if found is not None else None
        return version if version is not None and version.complete else None

    def champion(self, name: str) -> ModelVersion | None:
        """The version that the alias `champion` is on, or None where there is none."""
        with self._explained(f"cannot read {name}@champion"):
            aliases = self._aliases(name) or {}
            if "champion" not in aliases:
                return None
            return self._value(self._client.get_model_version(name, aliases["champion"]), aliases)

    def has_files(self, version: ModelVersion) -> bool:
        """Whether a version's lineage and model folder are where MLflow says that they are."""
        with self._explained(f"cannot look for the files of {version.name} version {version.version}"):
            return self._missing(version) is None

    def folder(self, name: str, version: int, destination: Path) -> Path:
        """Copy the model folder of a version to `destination`, a path that does not exist yet, and return it."""
        found = self.version(name, version)
        if found.pruned is not None:
            raise RegistryError(
                f"{self.shown}: {name} version {version} has no files any more: {found.pruned}",
                fix="choose another version; a run as of the same time makes the like of it",
            )
        if found.model_hash is None:
            raise RegistryError(
                f"{self.shown}: {name} version {version} was not registered by Evergreen: it has no model folder",
                fix=f"choose a version that `evergreen runs {name}` lists; MLflow itself may load this one",
            )
        with (
            self._explained(f"cannot fetch the model folder of {name} version {version}"),
            _workroom(destination.parent) as room,
        ):
            source = self._client.get_model_version_download_uri(name, str(version))
            try:
                self._download(f"{source}/artifacts/model", room).rename(destination)
            except _mlflow().exceptions.MlflowException:
                self._require_files(found)
                raise
        return destination

    def artifact(self, name: str, version: int, path: str) -> bytes | None:
        """A file that was registered with a version, or attached to it; None where it has none of that name."""
        found = self.version(name, version)
        if found.run_id is None:
            return None
        with self._explained(f"cannot read {path} of {name} version {version}"), _workroom() as room:
            parent = path.rpartition("/")[0] or None
            if path not in {file.path for file in self._client.list_artifacts(found.run_id, parent)}:
                if found.pruned is None and found.model_hash is not None:
                    self._require_files(found)
                return None
            artifacts = self._client.get_run(found.run_id).info.artifact_uri
            return self._download(f"{artifacts}/{path}", room).read_bytes()

    def attach(self, name: str, version: int, path: str, content: str) -> None:
        """Put a text beside the artifacts of a version's MLflow run, in place of one that is there."""
        found = self.version(name, version)
        if found.run_id is not None:
            with self._explained(f"cannot attach {path} to {name} version {version}"):
                self._client.log_text(found.run_id, content, path)

    def lineage(self, name: str, version: int) -> dict[str, Any]:
        """What made a version, by the keys of `Lineage`, the gate's verdict where it has spoken."""
        found = self.version(name, version)
        if found.run_id is None or found.model_hash is None:
            raise RegistryError(
                f"{self.shown}: {name} version {version} was not registered by Evergreen: it has no lineage",
                fix=f"choose a version that `evergreen runs {name}` lists",
            )
        with self._explained(f"cannot read the lineage of {name} version {version}"), _workroom() as room:
            run = self._client.get_run(found.run_id)
            artifacts = run.info.artifact_uri
            if LINEAGE not in {file.path for file in self._client.list_artifacts(found.run_id)}:
                if (known := unflat({**run.data.tags, **found.tags})) is None:
                    self._require_files(found)
                else:
                    log.warning("%s version %d: %s is not there; its tags tell the lineage", name, version, artifacts)
                    return known | {"version": version}
            lineage: dict[str, Any] = json.loads(self._download(f"{artifacts}/{LINEAGE}", room).read_text("utf-8"))
        # The file says where the snapshots were then; the tag follows a home that is moved.
        lineage["snapshot"]["repository"] = run.data.tags.get(home.REPOSITORY_TAG, lineage["snapshot"]["repository"])
        return lineage

    # -- one registration, step by step --------------------------------------------------------------------------

    def _log_files(self, run: MlflowRun, files: Mapping[str, Path]) -> None:
        """Files and folders under the paths within the run that they are to have."""
        if not files:
            return
        with _workroom() as room:
            for path, source in files.items():
                copy = room / path
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, copy) if source.is_dir() else shutil.copyfile(source, copy)
            self._client.log_artifacts(run.info.run_id, str(room))

    def _log_model(
        self, name: str, folder: Path, run: MlflowRun, lineage: Lineage, input_example: pd.DataFrame
    ) -> LoggedModel:
        """The model folder as the run's model, and the snapshot as what it was made from."""
        from mlflow.entities import LoggedModelOutput

        client, run_id = self._client, run.info.run_id
        model: LoggedModel = client.create_logged_model(
            run.info.experiment_id, name, run_id, params=_params(lineage), model_type="evergreen"
        )
        with _workroom() as room:
            _save(room / "model", folder, input_example, model_id=model.model_id, run_id=run_id)
            client.log_model_artifacts(model.model_id, str(room / "model"))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        client.log_inputs(run_id, [_dataset(lineage)])
        return model

    def _log_numbers(
        self,
        model: LoggedModel,
        params: Mapping[str, str],
        metrics: Mapping[str, float],
        curve: Sequence[Mapping[str, Any]],
    ) -> None:
        """Parameters, metrics, and the training curve as the history of `training/<name>`, in as few requests as can be."""
        from mlflow.entities import Metric, Param

        run_id, now = model.source_run_id, int(time.time() * 1000)
        final = [Metric(name, value, now, 0, model_id=model.model_id, run_id=run_id) for name, value in metrics.items()]
        history = [
            Metric(f"training/{_named(name)}", value, now, int(line["step"]))
            for line in curve
            for name, value in line.items()
            if name not in ("step", "of") and isinstance(value, int | float) and not isinstance(value, bool)
        ]
        entities = [Param(name, value) for name, value in params.items()]
        for start in range(0, len(entities), 100):  # MLflow's limits of one request: 100 parameters, 1000 metrics
            self._client.log_batch(run_id, params=entities[start : start + 100])
        for start in range(0, len(final + history), 1000):
            self._client.log_batch(run_id, metrics=(final + history)[start : start + 1000])

    def _show(self, name: str, model: LoggedModel, tags: Mapping[str, str], description: str) -> MlflowVersion:
        """The version that shows the model and its run, under a registered model that is made where there is none."""
        if self._aliases(name) is None:
            self._client.create_registered_model(name)
        return self._client.create_model_version(
            name,
            # The place itself: `models:/<id>` would be looked up through MLflow's process-wide tracking URI.
            source=model.artifact_location,
            run_id=model.source_run_id,
            model_id=model.model_id,
            tags=_fitting(tags, "tag"),
            description=description,
            await_creation_for=0,
        )

    def _complete(self, version: MlflowVersion, lineage: Lineage, tags: Mapping[str, str]) -> None:
        """What comes after the version's number is known; each step may be done again. The last tag is the proof."""
        if COMPLETE in version.tags:
            return
        client, name, number = self._client, version.name, str(version.version)
        numbered = lineage.model_copy(update={"version": int(number)})
        client.log_text(version.run_id, numbered.model_dump_json(indent=2), LINEAGE)
        for tag, value in _fitting(tags, "tag").items():
            if version.tags.get(tag) != value:
                client.set_model_version_tag(name, number, tag, value)
        # Shows the version beside the logged model in MLflow's UI, as its own log_model does.
        shown = json.dumps([{"name": name, "version": int(number)}])
        for output in client.get_run(version.run_id).outputs.model_outputs:
            client.set_logged_model_tags(output.model_id, {"mlflow.modelVersions": shown})
        client.set_terminated(version.run_id)
        client.set_model_version_tag(name, number, COMPLETE, "true")

    def _find(self, name: str, key: str) -> MlflowVersion | None:
        """The version that `key` made, or None."""
        found = self._client.search_model_versions(f"name = '{name}' AND tags.`{KEY}` = '{key}'")
        return min(found, key=lambda version: int(version.version), default=None)

    def _clear(self, experiment: str, key: str) -> None:
        """Delete the MLflow runs, and the models they logged, of attempts for `key` that came to no version."""
        client = self._client
        for run in client.search_runs([experiment], f"tags.`{KEY}` = '{key}'"):
            for model in client.search_logged_models([experiment], f"source_run_id = '{run.info.run_id}'"):
                client.delete_logged_model(model.model_id)
            client.delete_run(run.info.run_id)

    def _experiment(self, name: str) -> str:
        """The id of the experiment `name`, made when it is not there. A server chooses its own artifact root."""
        client = self._client
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            root = None if self._is_server else f"{_as_uri(self.artifacts)}/{name}"
            with contextlib.suppress(_mlflow().exceptions.MlflowException):  # another process made it meanwhile
                return str(client.create_experiment(name, artifact_location=root))
            experiment = client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage != "active":
            raise RegistryError(
                f"{self.shown}: the experiment {name!r} is deleted, or cannot be made",
                fix=f"mlflow experiments restore --experiment-id {getattr(experiment, 'experiment_id', '…')}",
            )
        return str(experiment.experiment_id)

    # -- the connection ------------------------------------------------------------------------------------------

    @property
    def shown(self) -> str:
        """The URI without its password."""
        parts = urlsplit(self.uri)
        if parts.password is None:
            return self.uri
        return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}"))

    @property
    def _is_server(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    @functools.cached_property
    def _client(self) -> Any:
        """MLflow's client, after a look whether there is anybody: MLflow itself tries for minutes."""
        mlflow = _mlflow()
        home.adopt(self.settings)
        if self._is_server:
            from mlflow.utils.credentials import get_default_host_creds
            from mlflow.utils.rest_utils import http_request

            creds = get_default_host_creds(self.uri)
            http_request(creds, "/health", "GET", max_retries=0, timeout=REACH_S, raise_on_status=False)
        else:
            _reach_database(self.uri)
        return mlflow.MlflowClient(self.uri, registry_uri=self.uri)

    def _missing(self, version: ModelVersion) -> str | None:
        """The place where a file of a version should be and is not; None where all that is looked for is there."""
        client, run = self._client, self._client.get_run(version.run_id)
        if LINEAGE not in {file.path for file in client.list_artifacts(version.run_id)}:
            return f"{run.info.artifact_uri}/{LINEAGE}"
        if run.outputs.model_outputs:
            model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
            parent = "artifacts/model"
            if not client.list_logged_model_artifacts(model.model_id, parent):
                return f"{model.artifact_location}/{parent}"
        return None

    def _require_files(self, version: ModelVersion) -> None:
        if (place := self._missing(version)) is not None:
            name, as_of = version.name, version.tags.get("evergreen.as_of", "…")[:16]
            raise RegistryError(
                f"{self.shown}: the files of {name} version {version.version} were removed: {place} is not there",
                fix=f"evergreen run {name} --as-of {as_of} logs them again, where data, code and packages are the same; or "
                f"bring them back from a copy; or, where it is champion: evergreen rollback {name} --why …",
            )

    def _value(self, version: MlflowVersion, aliases: Mapping[str, str]) -> ModelVersion:
        """A version as a value. Tags that somebody removed from it are those of its MLflow run."""
        value = _value(version, aliases)
        if value.model_hash is None and version.run_id:
            run = _unless_missing(lambda: self._client.get_run(version.run_id))
            kept = {} if run is None else run.data.tags
            if (model_hash := kept.get(MODEL_HASH)) is not None:
                shown = {tag: text for tag, text in kept.items() if tag in ON_VERSION}
                return value.model_copy(update={"model_hash": model_hash, "tags": shown | value.tags})
        return value

    def _aliases(self, name: str) -> dict[str, str] | None:
        """Alias → version of a registered model, or None where there is no such model."""
        model = _unless_missing(lambda: self._client.get_registered_model(name))
        return None if model is None else {alias: str(version) for alias, version in model.aliases.items()}

    def _download(self, uri: str, room: Path) -> Path:
        from mlflow.artifacts import download_artifacts

        return Path(download_artifacts(artifact_uri=uri, dst_path=str(room), tracking_uri=self.uri))

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Whatever MLflow, its database, the network or the disk says, as a RegistryError that names the registry."""
        mlflow = _mlflow()
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError, ValueError, ImportError) as error:
            lines = [line for line in str(error).splitlines() if line and not line.startswith("(raised as a result of")]
            said = (lines or [type(error).__name__])[0].strip()[:300]
            if password := urlsplit(self.uri).password:
                said = said.replace(password, "***")
            if match := DELETED_RUN.search(str(error)):
                said = f"its MLflow run {match[1]} was deleted"
                fix = (
                    "bring MLflow's database back from a copy, or choose another version; for the champion: evergreen "
                )
                fix += "rollback MODEL --to VERSION --why …"
            elif "out-of-date database schema" in said:
                fix = f"back the database up, then: mlflow db upgrade {self.shown}"
            else:
                fix = "check that it runs, that there is room on its disk, and that EVERGREEN_MLFLOW_TRACKING_URI is right"
            raise RegistryError(f"{self.shown}: {doing}: {said}", fix=fix) from error


@functools.cache
def _mlflow() -> Any:
    """MLflow, quiet, without telemetry, and with patience for seconds. Imported with the garbage collector off: a quarter less time."""
    quiet = {
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_UV_AUTO_DETECT": "false",  # it would take a uv.lock of the current folder for the model's
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    collecting = gc.isenabled()
    gc.disable()
    try:
        import mlflow
        import mlflow.pyfunc
    finally:
        if collecting:
            gc.enable()
    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return mlflow


def _reach_database(uri: str) -> None:
    """Connect once, within seconds; an SQLite database that is not there is made."""
    import sqlalchemy as sa

    url = sa.make_url(uri)
    if url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:"):
        _make_sqlite(Path(str(url.database)))
    timeouts = {"postgresql": "connect_timeout", "mysql": "connect_timeout", "sqlite": "timeout"}
    timeout = {timeouts[name]: REACH_S for name in [url.get_backend_name()] if name in timeouts}
    engine = sa.create_engine(url, connect_args=timeout, poolclass=sa.NullPool)
    with engine.connect() as connection:
        sa.inspect(connection).get_table_names()


def _make_sqlite(path: Path) -> None:
    """Make MLflow's database at `path` unless it is there. A kill or a rival leaves a whole one or none.

    MLflow's 69 migrations cost 0.5 s of computing and hundreds of flushes to disk, which a busy disk turns into
    seconds. Made aside, the file needs no flush before it is whole; then it is linked into place.
    """
    if path.exists():
        return
    import sqlalchemy as sa
    from mlflow.store.db.utils import _initialize_tables

    path.parent.mkdir(parents=True, exist_ok=True)
    with _workroom(path.parent) as room:
        fresh = room / "mlflow.db"
        engine = sa.create_engine(f"sqlite:///{fresh}", poolclass=sa.StaticPool)

        @sa.event.listens_for(engine, "connect")
        def _in_haste(connection: Any, _record: Any) -> None:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")

        _initialize_tables(engine)
        with engine.connect() as connection:
            # Kept in the file: readers and a writer (the UI and a run) then do not wait for each other.
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        engine.dispose()
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)


@contextlib.contextmanager
def _workroom(parent: Path | None = None) -> Iterator[Path]:
    """A folder of this user's alone (mode 700) that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=".evergreen-", dir=parent) as room:
        yield Path(room)


def _save(target: Path, folder: Path, input_example: pd.DataFrame, *, model_id: str, run_id: str) -> None:
    """An MLflow model at `target`: models-from-code over the model folder, signature and requirements given."""
    mlflow = _mlflow()
    described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    with _workroom() as room:
        # MLflow keeps the folder's own name, where `folder()` looks for `model`, and refuses links, which the store makes.
        shutil.copytree(folder, room / "model", ignore=shutil.ignore_patterns("__pycache__"))
        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(ENTRY),
            artifacts={"model": str(room / "model"), "conversion": str(CONVERSION)},
            signature=_signature(described["inputs"]),
            input_example=input_example,
            pip_requirements=[f"mlflow=={mlflow.__version__}", *described["requirements"]],
            metadata={name: described[name] for name in ("inputs", "task", "classes") if name in described},
            mlflow_model=mlflow.models.Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
        )


def _signature(inputs: Mapping[str, str]) -> ModelSignature:
    """The raw columns, each of any type.

    MLflow would enforce a type before the version's own conversion sees the rows, and refuses what loses nothing: whole
    numbers as floats where one is missing, numbers in text, instants with a zone. What each column really is stands in
    the model's metadata.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, Schema

    return ModelSignature(inputs=Schema([ColSpec(AnyType(), column) for column in inputs]))


def _dataset(lineage: Lineage) -> Any:
    """The snapshot as MLflow's dataset input: the DVC tree hash is its digest, the git repository its source."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    snapshot = lineage.snapshot
    source = {
        "mlflow.source.type": "DVC",
        "mlflow.source.name": f"{snapshot.repository}@{snapshot.tag}",
        "mlflow.source.git.repoURL": snapshot.repository,
        "mlflow.source.git.commit": snapshot.revision,
    }
    dataset = Dataset(
        name=lineage.model,
        digest=snapshot.hash,
        source_type="code",  # of the types that a stock mlflow.data.get_source() reads, the one for a git repository
        source=json.dumps({"tags": source}),
        profile=json.dumps({"rows": snapshot.rows, "bytes": snapshot.bytes, "partitions": snapshot.partitions}),
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])


def _run_tags(lineage: Lineage, description: str) -> dict[str, str]:
    """MLflow's own tags for where a run came from."""
    tags = {"mlflow.note.content": description, "mlflow.source.name": "evergreen", "mlflow.source.type": "PROJECT"}
    revision = lineage.code.revision
    return tags | ({"mlflow.source.git.commit": revision} if revision else {})


def _named(name: str) -> str:
    """A name of the pack's as MLflow takes it."""
    return re.sub(r"[^/\w.\- :]", "_", name)


def _params(lineage: Lineage) -> dict[str, str]:
    """The training parameters and the seed, under names and in lengths that MLflow takes."""
    params = {**lineage.training.params, "seed": lineage.training.seed}
    return _fitting({_named(name): as_tag(value) for name, value in params.items()}, "param")


def _fitting(values: Mapping[str, str], kind: str) -> dict[str, str]:
    """`values` as MLflow takes them, those too long for it replaced by where they stand whole."""
    whole = f"in the artifact {LINEAGE}"
    return {name: sayable(value) if len(value) <= LONGEST[kind] else whole for name, value in values.items()}


def _value(version: MlflowVersion, aliases: Mapping[str, str]) -> ModelVersion:
    number = str(version.version)
    return ModelVersion(
        name=version.name,
        version=int(number),
        aliases=tuple(sorted(alias for alias, at in aliases.items() if at == number)),
        run_id=version.run_id or None,
        tags=dict(version.tags),
        model_hash=version.tags.get(MODEL_HASH),
        complete=COMPLETE in version.tags,
        pruned=version.tags.get(PRUNED),
    )


def _unless_missing(read: Callable[[], Any]) -> Any:
    """What `read` returns, or None where MLflow says that there is no such thing."""
    try:
        return read()
    except _mlflow().exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _as_uri(place: str) -> str:
    """A path as a file URI; a URI as it is."""
    return place.rstrip("/") if "://" in place else Path(place).absolute().as_uri()
