"""A real container engine for tests: Evergreen's image with the package as it is here, and a door to the engine."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import MissingError

import evergreen


@contextmanager
def image() -> Iterator[str]:
    """The id of an image that is removed in the end. Raises MissingError where there is no engine or nothing to begin from."""
    import docker  # here, since every test's process reads this file

    name = os.environ.get("EVERGREEN_IMAGE") or f"evergreen:{evergreen.__version__}"
    try:
        engine = docker.from_env()
        engine.images.get(name)
    except docker.errors.DockerException as error:
        raise MissingError(f"no container engine with an image {name}: {error}") from error
    package = Path(evergreen.__file__).parent
    recipe = f"FROM {name}\nCOPY . /srv/evergreen/include/evergreen\n"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(package, ".", filter=lambda found: None if "__pycache__" in found.name else found)
        told = tarfile.TarInfo("Dockerfile")
        told.size = len(recipe)
        archive.addfile(told, io.BytesIO(recipe.encode()))
    content.seek(0)
    mine = {"evergreen.test": uuid.uuid4().hex}  # or another process's image would be this one, and be removed by it
    made, _ = engine.images.build(fileobj=content, custom_context=True, rm=True, labels=mine)
    yield made.id
    engine.images.remove(made.id, force=True)
    engine.close()


@contextmanager
def door(folder: Path, image: str) -> Iterator[Path]:
    """The socket of a door for jobs somewhere in `folder`, in `image`; `folder` is the volume that they share."""
    import docker

    engine = docker.from_env()
    where = {"type": "none", "o": "bind", "device": str(folder)}
    volume = engine.volumes.create(f"evergreen-test-{uuid.uuid4().hex[:12]}", driver="local", driver_opts=where)
    path = folder / "engine.sock"
    asked = ["--socket", str(path), "--volume", f"{volume.name}:{folder}", "--memory", "2", "--cpus", "2"]
    asked += ["--images", "churn:* , other:* ,"]
    if host := os.environ.get("DOCKER_HOST"):
        asked += ["--engine", host]
    process = subprocess.Popen(
        [sys.executable, "-m", "evergreen.training.engine", *asked],
        env={**os.environ, "EVERGREEN_IMAGE": image},
    )
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield path
    finally:
        process.terminate()
        process.wait()
        for left in engine.containers.list(all=True, filters={"label": f"evergreen.engine={volume.name}"}):
            left.remove(force=True)
        volume.remove()
        engine.close()
