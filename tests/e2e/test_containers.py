"""A pack whose jobs are containers, on a real engine: what the version that comes of it says of where it was made."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import docker
import pytest

from evergreen.settings import Settings

pytestmark = pytest.mark.slow

PACK = Settings.from_env({}).packs / "digits"
EVERGREEN = Path(sys.executable).parent / "evergreen"


def test_a_version_that_a_container_made_names_its_image(tmp_path, image, door):
    """By id or digest, in its lineage; and no container is left when the run has ended."""
    pack = tmp_path / "packs" / "digits"
    shutil.copytree(PACK, pack, ignore=shutil.ignore_patterns("__pycache__"))
    told = (
        (PACK / "pack.yaml").read_text().replace("training:\n", "training:\n  runtime: {docker: IMAGE, memory: 1g}\n")
    )
    (pack / "pack.yaml").write_text(told.replace("IMAGE", image))
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("EVERGREEN", "AIRFLOW"))},
        "EVERGREEN_HOME": str(tmp_path / "home"),
        "EVERGREEN_PACKS": str(pack.parent),
        "DOCKER_HOST": f"unix://{door}",
    }

    def evergreen(*words):
        done = subprocess.run(
            [EVERGREEN, *words], env=environ, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    evergreen("run", "digits", "--as-of", "2020-05-01")
    lineage = json.loads(evergreen("lineage", "digits@champion", "--json"))
    assert lineage["environment"]["image"] == image
    with closing(docker.from_env()) as engine:
        assert not engine.containers.list(all=True, filters={"label": "evergreen.pack=digits", "ancestor": image})
