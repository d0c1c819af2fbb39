"""What made a version: data, code, packages, hardware, training, figures, verdict. Stable keys, the same everywhere."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import evergreen
from evergreen.run import Class, Evaluated, Hardware, Run, Snapshot, Trained, Validated, Value, Verdict, Windows
from evergreen.settings import Settings


class Data(Value):
    """The snapshot that the model was trained and judged on."""

    repository: str
    revision: str
    tag: str
    hash: str
    rows: int
    bytes: int
    partitions: int


class Validation(Value):
    """What Great Expectations said of the snapshot's rows."""

    success: bool
    suite_hash: str
    rows_checked: int
    rows_quarantined: int


class Code(Value):
    """The project's code. `revision` and `dirty` are None outside git."""

    revision: str | None
    dirty: bool | None
    """Whether files differ from the revision, files git does not know included."""
    evergreen: str


class Environment(Value):
    """The interpreter and the packages."""

    python: str
    lock_hash: str | None
    """sha256 of the project's requirements.txt."""
    image: str | None


class Training(Value):
    """What the training function was given, and how long it took."""

    params: dict[str, Any]
    seed: int
    duration_s: float
    classes: tuple[Class, ...] | None = None
    """Of a multiclass model, in the order of its predictions."""


class Figure(Value):
    """A metric and its interval."""

    value: float
    low: float | None
    high: float | None


class Lineage(Value):
    """All that made a version."""

    model: str
    version: int | None
    """None until MLflow has given the number."""
    run_id: str
    as_of: datetime
    data_until: datetime
    windows: Windows
    """Which rows it was trained on, chosen by, and judged on."""
    reason: str
    snapshot: Data
    validation: Validation
    code: Code
    environment: Environment
    hardware: Hardware
    training: Training
    metrics: dict[str, Figure]
    """On the hold-out rows."""
    verdict: Verdict | None
    """None until the gate has spoken."""


def lineage(
    *,
    run: Run,
    code: Code,
    environment: Environment,
    validated: Validated,
    snapshot: Snapshot,
    trained: Trained,
    evaluated: Evaluated,
    verdict: Verdict | None = None,
    version: int | None = None,
) -> Lineage:
    """The lineage of the version that `run` makes, put together from what its stages handed on."""
    return Lineage(
        model=run.pack.name,
        version=version,
        run_id=run.id,
        as_of=run.as_of,
        data_until=snapshot.data_until,
        windows=trained.windows,
        reason=run.reason,
        snapshot=Data(**snapshot.model_dump(include=set(Data.model_fields))),
        validation=Validation(**validated.model_dump(include=set(Validation.model_fields))),
        code=code,
        environment=environment.model_copy(update={"image": trained.image or environment.image}),
        hardware=trained.hardware,
        training=Training(**trained.model_dump(include=set(Training.model_fields))),
        metrics={
            name: Figure(**estimate.model_dump(include=set(Figure.model_fields)))
            for name, estimate in evaluated.challenger.metrics.items()
        },
        verdict=verdict,
    )


def code(settings: Settings) -> Code:
    """The git revision of the project and whether its files differ from it."""
    if settings.revision is not None:
        noted, _, dirty = settings.revision.partition("-")
        return Code(revision=noted, dirty=bool(dirty), evergreen=evergreen.__version__)
    revision = _git(settings.project, "rev-parse", "HEAD")
    status = _git(settings.project, "status", "--porcelain", "--", ".") if revision is not None else None
    return Code(
        revision=revision,
        dirty=None if status is None else bool(status),
        evergreen=evergreen.__version__,
    )


def environment(settings: Settings) -> Environment:
    """The interpreter's version, the lock file's hash, and the image when there is one."""
    lock = settings.project / "requirements.txt"
    return Environment(
        python=platform.python_version(),
        lock_hash=hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None,
        image=settings.image,
    )


def flat(lineage: Lineage) -> dict[str, str]:
    """The lineage as tags: `evergreen.run_id`, `evergreen.snapshot.hash`, …; what is deeper, as JSON; no None."""
    values = lineage.model_dump(mode="json")
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "metrics":
            found |= {f"evergreen.{key}.{part}": content for part, content in value.items()}
        else:
            found[f"evergreen.{key}"] = value
    return {key: as_tag(value) for key, value in found.items() if value is not None}


def unflat(tags: Mapping[str, str]) -> dict[str, Any] | None:
    """Read a lineage back from the tags that `flat` made; None where they are not whole: removed, or too long for a tag."""
    values: dict[str, Any] = {"version": None, "verdict": None}
    optional = {
        "code": ("revision", "dirty"),
        "environment": ("lock_hash", "image"),
        "hardware": ("driver",),
    }
    for part, names in optional.items():
        values[part] = dict.fromkeys(names)
    try:
        for tag, text in tags.items():
            field, _, part = tag.removeprefix("evergreen.").partition(".")
            if tag.startswith("evergreen.") and field in Lineage.model_fields:
                value = json.loads(text) if text[:1] in ("{", "[") and field != "reason" else text
                values[field] = {**(values.get(field) or {}), part: value} if part else value
        return Lineage.model_validate(values).model_dump(mode="json")
    except ValueError:
        return None


def as_tag(value: Any) -> str:
    """Text as it is, anything else as canonical JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git, no repository or no commit."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
