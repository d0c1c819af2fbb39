"""What the chain and the monitor share: folders to work in, and jobs of the run's pack."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from evergreen.data.store import Store
from evergreen.database import Event
from evergreen.errors import EvergreenError, JobError, StoreError
from evergreen.keys import note
from evergreen.pack import Pack, read_own
from evergreen.registry.ledger import Checkpoint
from evergreen.run import Manifest, Ref, Run, digest
from evergreen.settings import Settings
from evergreen.training import jobs
from evergreen.training.runtimes import docker

log = logging.getLogger("evergreen")


@contextmanager
def work_folder(run: Run) -> Iterator[Path]:
    """A folder for the length of a stage, on the disk of the jobs so that links work."""
    run.settings.jobs.mkdir(parents=True, exist_ok=True)
    prefix = f"stage-{run.pack.name}-{run.slug}-"  # runs of two packs may share an Airflow run id
    for left in run.settings.jobs.glob(f"{prefix}*"):  # by an attempt that was killed: one at a time acts here
        shutil.rmtree(left, ignore_errors=True)
    with _room(run.settings.jobs):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=run.settings.jobs))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """What a full disk makes each library say in words of its own, as one error that names the folder."""
    try:
        yield
    except EvergreenError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise JobError(
            f"the disk of {folder}, where stages and jobs work, is full",
            fix="make room there, or set EVERGREEN_JOBS to a folder on a larger disk, then run again",
        ) from error


def manifest_of(store: Store, ref: Ref) -> Manifest:
    """The manifest that `ref` is."""
    return Manifest.model_validate(store.read_json(ref))


def job_id_of(run: Run, kind: str, parts: dict[str, Any]) -> str:
    """A job's id follows from what it does, so that a retry finds it. A forced run's jobs are its own."""
    own = {"force": run.id} if run.force else {}
    if kind != "read" and (container := container_of(run)):
        own["image"] = container.image
    return f"{kind}-{run.pack.name}-{digest({**parts, **own})[:16]}"


def container_of(run: Run) -> jobs.Container | None:
    """What the pack's jobs run in, its image by digest; None for processes. Raises JobError."""
    asked = run.pack.training.runtime
    if asked is None:
        return None
    image = asked.docker or run.settings.image
    if image is None:
        raise JobError(
            f"pack {run.pack.name}: training.runtime is docker, and nobody says which image is Evergreen's",
            fix="set EVERGREEN_IMAGE, or name one in pack.yaml: runtime: {docker: IMAGE}",
        )
    return jobs.Container(image=docker.pinned(image), memory_bytes=asked.memory, cpus=asked.cpus)


def job_spec(run: Run, kind: Literal["read", "train", "score"], job_id: str, **more: Any) -> jobs.JobSpec:
    """What a job of this run's pack is told."""
    pack = run.pack
    return jobs.JobSpec(
        id=job_id,
        kind=kind,
        pack=pack.name,
        target=pack.data.target,
        event_time=pack.data.event_time,
        task=pack.data.task,
        params=pack.training.params,
        seed=pack.training.seed,
        gpus=pack.training.gpus,
        timeout_s=pack.training.timeout.total_seconds(),
        container=container_of(run) if kind != "read" else None,
        **more,
    )


def copy_python(pack: Pack, folder: Path) -> None:
    """The pack's Python, for a job to import."""
    target = folder / "pack"
    target.mkdir(parents=True)
    for file in pack.python_files:
        (target / file.name).write_bytes(read_own(file))


def finish_job(run: Run, stage: str, spec: jobs.JobSpec, fill: Callable[[Path], None]) -> jobs.JobResult:
    """Start or adopt the job, wait for it, and tell how it gets on."""

    def tell(progress: jobs.Progress) -> None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in list(progress.metrics.items())[:4])
        left = f"  {progress.eta_s:.0f} s left" if progress.eta_s is not None else ""
        note(
            run, stage, "progress", f"step {progress.step} of {progress.of}  {shown}{left}", fraction=progress.fraction
        )

    with _room(run.settings.jobs):
        return jobs.wait(jobs.start(run.settings, spec, fill), tell)


def checkpoint(settings: Settings, event: Event) -> None:
    """Note an event that changed the champion outside of the database, once.

    A repository that cannot be reached undoes no change: the log says so, and the next checkpoint covers this one.
    """
    try:
        note_head(settings, event)
    except StoreError as error:
        log.warning("%s: no checkpoint of its ledger was kept: %s", event.pack, error.what)


def note_head(settings: Settings, event: Event) -> None:
    """Note an event outside of the database, once. Raises StoreError."""
    Store(settings).note(event.pack, str(Checkpoint.of(event)))


def checkpoints(settings: Settings, pack: str) -> list[Checkpoint]:
    """What was noted of a pack's events, oldest first. Raises StoreError."""
    return [Checkpoint.parse(text) for text in Store(settings).notes(pack)]
