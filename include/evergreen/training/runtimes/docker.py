"""A job as a container of this machine's engine: the same folder, and nothing else of the machine.

The container's name follows from the folder, so whoever asks for the job finds it. It has no network, no capability and
no way to gain one, a root that it cannot write to, a `/tmp` in memory, and limits; the job's folder is all it shares,
`input/` for reading only. It runs as the user who asks for it, or as nobody where that is root. Its output goes to
`log.txt`; it stays, ended, until it is stopped for good.

Whoever may speak to the engine's socket owns the machine: hosts, and workers that are given it on purpose, run this.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from evergreen.errors import JobError
from evergreen.training.runtimes import process

NOBODY = 65534
PIDS = 4096
SHARED_MEMORY = 2**30
"""Bytes that processes of one job may share by /dev/shm, as torch's loaders do."""
TMPFS = {"/tmp": "rw,nosuid,nodev,mode=1777"}  # noqa: S108 - the container's own
KEPT = ("LANG", "LANGUAGE", "TZ")
LIVING = ("running", "paused", "restarting", "removing")
START = """
for name in $(env | grep -oE "^(AIRFLOW|EVERGREEN|MLFLOW)[A-Za-z0-9_]*"); do unset "$name"; done
exec python -P -m evergreen.runner "$0" >> "$0/log.txt" 2>&1
"""
"""What the image says of Airflow, MLflow and Evergreen is not the job's."""


def pinned(image: str) -> str:
    """The image by what it holds, pulled where it is missing: its digest in a registry, or its id where it has none.

    Raises JobError.
    """
    with _engine(f"image {image}") as engine:
        import docker.errors

        try:
            found = engine.images.get(image)
        except docker.errors.ImageNotFound:
            found = engine.images.pull(image)
        return str((found.attrs.get("RepoDigests") or [found.id])[0])


def launch(folder: Path) -> None:
    """Start `evergreen.runner` on the folder, in the container of its `job.json`. Raises JobError."""
    spec = json.loads((folder / "job.json").read_bytes())
    asked = spec["container"]
    with _engine(f"job {folder.name}") as engine:
        left = _container(engine, folder)
        if left is not None and left.status in LIVING:
            raise JobError(f"container {left.name} runs already", fix=f"end it with `docker rm -f {left.name}`")
        if left is not None:
            left.remove(force=True)
        described = engine.info()
        engine.containers.run(
            asked["image"],
            name=container_name(folder),
            entrypoint=["sh", "-c", START],
            command=[str(folder)],
            detach=True,
            init=True,
            user=_user(folder),
            working_dir=str(folder),
            environment=environment(os.environ),
            volumes=[f"{folder}:{folder}", f"{folder / 'input'}:{folder / 'input'}:ro"],
            tmpfs=TMPFS,
            network_mode="none",
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            pids_limit=PIDS,
            mem_limit=asked["memory_bytes"],
            memswap_limit=asked["memory_bytes"],
            nano_cpus=int(min(asked["cpus"], described["NCPU"]) * 1e9),
            shm_size=SHARED_MEMORY,
            device_requests=_devices(spec["gpus"], described),
            labels={"evergreen.job": folder.name, "evergreen.pack": spec["pack"]},
            log_config={"type": "none"},
        )


def alive(folder: Path) -> bool:
    """Whether the job runs, whoever started it."""
    with _engine(f"job {folder.name}") as engine:
        found = _container(engine, folder)
        return found is not None and found.status in LIVING


def age_s(folder: Path) -> float:
    """Seconds since the last launch; 0 before the first."""
    with _engine(f"job {folder.name}") as engine:
        found = _container(engine, folder)
        if found is None:
            return 0.0
        return time.time() - datetime.fromisoformat(found.attrs["Created"][:19] + "+00:00").timestamp()


def join(folder: Path, timeout_s: float) -> bool:
    """Wait for the end of the job's container, at most so long; whether it has ended."""
    import requests

    with _engine(f"job {folder.name}") as engine:
        found = _container(engine, folder)
        if found is None or found.status not in LIVING:
            return True
        with suppress(requests.exceptions.Timeout, requests.exceptions.ConnectionError):  # how a wait says: not yet
            found.wait(timeout=max(timeout_s, 0.01))
        found = _container(engine, folder)
        return found is None or found.status not in LIVING


def stop(folder: Path, grace_s: float = 5.0) -> None:
    """End the container with all its processes: SIGTERM, then SIGKILL after the grace; and remove it."""
    import docker.errors

    with _engine(f"job {folder.name}") as engine:
        found = _container(engine, folder)
        if found is None:
            return
        with suppress(docker.errors.NotFound):  # another came first
            if found.status in LIVING:
                found.stop(timeout=int(grace_s))
            found.remove(force=True)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a process of this machine would be given, less what names its folders, and what NVIDIA's toolkit obeys."""
    of_this_machine = set(process.KEPT) - set(KEPT)
    kept = {
        name: value
        for name, value in process.environment(environ).items()
        if name not in of_this_machine and not name.startswith(("LD_", "NVIDIA_"))
    }
    return {**kept, "HOME": "/tmp"}  # noqa: S108 - the container's own


def container_name(folder: Path) -> str:
    """The job's id, and what tells homes on one machine apart."""
    return f"evergreen-{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"


def _user(folder: Path) -> str:
    """Who the job runs as; where the caller is root, its folder but for `input/` is given to nobody."""
    if os.geteuid() != 0:
        return f"{os.geteuid()}:{os.getegid()}"
    for place in (folder, *(path for path in folder.rglob("*") if folder / "input" not in (path, *path.parents))):
        os.chown(place, NOBODY, NOBODY, follow_symlinks=False)
    return f"{NOBODY}:{NOBODY}"


def _devices(gpus: str | int, engine: Mapping[str, Any]) -> list[Any]:
    """All GPUs, by NVIDIA's toolkit: where they are asked for, and, for `auto`, where the toolkit is."""
    from docker.types import DeviceRequest

    if gpus == 0 or (gpus == "auto" and "nvidia" not in engine.get("Runtimes", {})):
        return []
    return [DeviceRequest(count=-1 if gpus == "auto" else int(gpus), capabilities=[["gpu"]])]


def _container(engine: Any, folder: Path) -> Any:
    """The job's container, ended or not; None where there is none."""
    import docker.errors

    try:
        return engine.containers.get(container_name(folder))
    except docker.errors.NotFound:
        return None


@contextmanager
def _engine(what: str) -> Iterator[Any]:
    """The engine that DOCKER_HOST says, or this machine's; what it cannot or will not do is a JobError."""
    import docker
    import docker.errors

    try:
        engine = docker.from_env()
    except docker.errors.DockerException as error:
        raise JobError(
            f"{what}: no container engine answers: {error}",
            fix="start it, or let this user speak to its socket (DOCKER_HOST); or set training.runtime: process",
        ) from error
    try:
        yield engine
    except docker.errors.DockerException as error:
        said = getattr(error, "explanation", None) or error
        raise JobError(
            f"{what}: the container engine refuses: {said}",
            fix="check training.runtime in pack.yaml: the image, memory and cpus; `docker info` says what the engine has",
        ) from error
    finally:
        engine.close()
