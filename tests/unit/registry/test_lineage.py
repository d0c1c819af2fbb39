"""What made a version, under keys that stay."""

from __future__ import annotations

import hashlib
import subprocess

import pytest

import evergreen
import evergreen.settings
from evergreen.registry import lineage
from evergreen.run import Verdict

KEYS = {
    "snapshot": {"repository", "revision", "tag", "hash", "rows", "bytes", "partitions"},
    "validation": {"success", "suite_hash", "rows_checked", "rows_quarantined"},
    "code": {"revision", "dirty", "evergreen"},
    "environment": {"python", "lock_hash", "image"},
    "hardware": {"device", "name", "driver"},
    "training": {"params", "seed", "duration_s", "classes"},
}
TOP = {"model", "version", "run_id", "as_of", "data_until", "windows", "reason", "metrics", "verdict"}


@pytest.fixture
def project(tmp_path):
    """A git repository with one commit, as settings."""
    settings = evergreen.settings.Settings.from_env({"EVERGREEN_PROJECT": str(tmp_path)})
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    (tmp_path / "requirements.txt").write_text("numpy==2.0\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    return settings


def test_keys_are_the_promised_ones(given):
    """The JSON of a lineage has the keys that `evergreen lineage --json` promises."""
    values = given.made_of("m").model_dump(mode="json")
    assert (set(values), {key: set(values[key]) for key in KEYS}) == (TOP | set(KEYS), KEYS)


def test_code_is_the_git_revision(project):
    """The code's revision is the project's commit."""
    head = subprocess.run(
        ["git", "-C", str(project.project), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert lineage.code(project) == lineage.Code(
        revision=head.stdout.strip(), dirty=False, evergreen=evergreen.__version__
    )


def test_unknown_file_makes_the_code_dirty(project):
    """A file that git does not know could be code that ran: the code is dirty."""
    (project.project / "model.py").write_text("x = 1\n")
    assert lineage.code(project).dirty


@pytest.mark.parametrize(("noted", "dirty"), [("a" * 40, False), (f"{'a' * 40}-dirty", True)])
def test_code_in_an_image_is_what_the_image_was_made_of(tmp_path, noted, dirty):
    """Where git cannot be asked, the revision is the one that was noted when the image was built."""
    settings = evergreen.settings.Settings.from_env({"EVERGREEN_PROJECT": str(tmp_path), "EVERGREEN_REVISION": noted})
    assert (lineage.code(settings).revision, lineage.code(settings).dirty) == ("a" * 40, dirty)


def test_code_outside_git_has_no_revision(tmp_path):
    """A project that is no repository has neither revision nor dirt."""
    settings = evergreen.settings.Settings.from_env({"EVERGREEN_PROJECT": str(tmp_path)})
    assert (lineage.code(settings).revision, lineage.code(settings).dirty) == (None, None)


def test_environment_has_the_hash_of_the_lock(project):
    """The packages are known by the lock file's sha256."""
    assert lineage.environment(project).lock_hash == hashlib.sha256(b"numpy==2.0\n").hexdigest()


def test_tags_are_text_and_leave_out_nothing_but_none(given):
    """Every part of a lineage is a tag: text as it is, the rest as JSON; None is no tag."""
    tags = lineage.flat(given.made_of("m"))
    assert (tags["evergreen.hardware.device"], tags["evergreen.validation.success"], "evergreen.verdict" in tags) == (
        "cpu",
        "true",
        False,
    )


def test_a_lineage_is_read_back_from_its_tags(given):
    """What `flat` makes of a lineage, `unflat` reads; without a tag that it needs, or with a broken one, nothing."""
    whole = given.made_of("flights", version=3, verdict=Verdict(decision="promote", reasons=("better",)))
    tags = {**lineage.flat(whole), "mlflow.runName": "x"}
    assert lineage.unflat(tags) == whole.model_dump(mode="json")
    assert lineage.unflat({tag: text for tag, text in tags.items() if tag != "evergreen.snapshot.hash"}) is None
    assert lineage.unflat({**tags, "evergreen.training.params": "in the artifact lineage.json"}) is None
    assert lineage.unflat({**tags, "evergreen.hardware.name": "[broken"}) is None
