"""What people and crashes do in the snapshots' repository: a snapshot lands all the same, or one sentence says why not.

Each test of an error does what its fix says; then the snapshot lands.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from evergreen.data.git_errors import explain
from evergreen.data.repository import Commit
from evergreen.data.store import Store
from evergreen.errors import StoreError
from evergreen.settings import Settings

FIRST = datetime(2024, 1, 1, tzinfo=UTC)


def git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Dataset:
    """Snapshots of `tide`, each a day later than the one before."""

    def __init__(self, home: Path, **places: str) -> None:
        given = {f"EVERGREEN_{name.upper()}": value for name, value in places.items()}
        self.settings = Settings.from_env({"EVERGREEN_HOME": str(home), **given})
        self.repository = Path(self.settings.data_repository)
        self.day = 0

    def commit(self) -> Commit:
        self.day += 1
        store = Store(self.settings)
        files = {"rows.parquet": store.put_bytes(f"day {self.day}".encode())}
        return store.commit("tide", files, tag_time=FIRST + timedelta(days=self.day), message=f"day {self.day}")

    def lands(self) -> None:
        """Hold the next snapshot to being the tip of its branch, under its tag."""
        commit = self.commit()
        tips = git(self.repository, "rev-parse", "refs/heads/tide", f"refs/tags/{commit.tag}").split()
        assert tips == [commit.revision] * 2

    def refuses(self) -> StoreError:
        """The error of the next snapshot: what is wrong is one sentence, and nothing of git is cut off in it."""
        with pytest.raises(StoreError) as caught:
            self.commit()
        assert "\n" not in caught.value.what
        assert str(self.repository) in caught.value.what
        return caught.value

    def mends(self, command: str) -> None:
        """Do what the fix of the next snapshot's error says, which contains `command`; then the snapshot lands."""
        fix = self.refuses().fix
        assert command in fix
        subprocess.run(command, shell=True, check=True, capture_output=True, cwd="/")
        self.lands()


@pytest.fixture
def tide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A home's own repository with a snapshot."""
    monkeypatch.setattr("evergreen.data.repository.PAUSE_S", 0.001)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    dataset = Dataset(tmp_path / "home")
    dataset.lands()
    return dataset


def test_a_checked_out_branch_takes_snapshots(tide):
    """The checkout stays at its commit, clean and detached; checked out again, it shows the newest snapshot."""
    git(tide.repository, "checkout", "--quiet", "tide")
    before = git(tide.repository, "rev-parse", "HEAD")
    tide.lands()
    tide.lands()
    assert git(tide.repository, "rev-parse", "HEAD") == before
    assert git(tide.repository, "branch", "--show-current") == ""
    assert git(tide.repository, "status", "--short") == ""
    git(tide.repository, "checkout", "--quiet", "tide")
    assert git(tide.repository, "rev-parse", "HEAD") == git(tide.repository, "rev-parse", "tide") != before


@pytest.mark.parametrize("setting", [None, "updateInstead"])
def test_changed_files_of_a_checkout_stay(tide, setting):
    """What a person has changed and not committed is there afterwards, just so, in a repository of either kind."""
    if setting:
        git(tide.repository, "config", "receive.denyCurrentBranch", setting)
    git(tide.repository, "checkout", "--quiet", "tide")
    (tide.repository / "tide.dvc").write_text("mine")
    (tide.repository / "staged").write_text("mine, too")
    git(tide.repository, "add", "staged")
    before = git(tide.repository, "status", "--short")
    tide.lands()
    assert git(tide.repository, "status", "--short") == before
    assert (tide.repository / "tide.dvc").read_text() == "mine"


def test_a_checkout_in_a_worktree_takes_snapshots(tide, tmp_path):
    """A second worktree is detached, too; the repository's own checkout is not touched."""
    git(tide.repository, "worktree", "add", "--quiet", str(tmp_path / "a tree"), "tide")
    before = git(tmp_path / "a tree", "rev-parse", "HEAD")
    tide.lands()
    assert git(tmp_path / "a tree", "rev-parse", "HEAD") == before
    assert git(tide.repository, "branch", "--show-current") == "main"


def test_a_worktree_whose_folder_is_gone_is_named(tide, tmp_path):
    """Git takes the branch for checked out until the worktree is pruned, which is what the fix says."""
    git(tide.repository, "worktree", "add", "--quiet", str(tmp_path / "tree"), "tide")
    shutil.rmtree(tmp_path / "tree")
    tide.mends(f"git -C {tide.repository} worktree prune")


def test_a_rebase_of_the_branch_is_named(tide):
    """A rebase that has not ended holds the branch; quit, as the fix says, it lets go."""
    for _ in range(2):
        tide.lands()
    git(tide.repository, "checkout", "--quiet", "tide")
    subprocess.run(
        ["git", "-C", str(tide.repository), "rebase", "--quiet", "--force-rebase", "--exec", "false", "HEAD~1"],
        check=False,
        capture_output=True,
        env={**os.environ, "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.com"},
    )
    assert "rebase in progress" in git(tide.repository, "status")
    tide.mends(f"git -C {tide.repository} rebase --quit")


@pytest.mark.parametrize("lock", ["refs/heads/tide.lock", "packed-refs.lock", "HEAD.lock", "index.lock"])
def test_a_lock_that_a_killed_git_left_is_named(tide, lock):
    """A lock that is in the way is named, to be removed; one that is not, is not."""
    if lock == "HEAD.lock":
        git(tide.repository, "checkout", "--quiet", "tide")  # has to be detached
    file = tide.repository / ".git" / lock
    file.touch()
    if lock in ("index.lock", "packed-refs.lock"):
        tide.lands()
    else:
        tide.mends(f"rm {file}")


def test_a_branch_in_the_way_is_named(tide):
    """`tide/x` and `tide` cannot both be; renamed as the fix says, both are kept."""
    git(tide.repository, "branch", "-m", "tide", "tide/x")
    tide.mends(f"git -C {tide.repository} branch -m tide/x tide-x-kept")
    assert git(tide.repository, "branch", "--list", "tide-x-kept")


def test_a_tag_in_the_way_is_named(tide):
    """The tag `tide` stands in the way of all tags of snapshots; renamed, it is kept."""
    for tag in git(tide.repository, "tag").split():
        git(tide.repository, "tag", "--delete", tag)
    git(tide.repository, "tag", "tide", "main")
    at = f"git -C {tide.repository}"
    tide.mends(f"{at} tag tide-kept refs/tags/tide && {at} tag --delete tide")
    assert git(tide.repository, "tag", "--list", "tide-kept")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
@pytest.mark.parametrize("checked_out", [False, True])
@pytest.mark.parametrize("mend", ["chown", "trust"])
def test_another_users_repository_is_named(tide, mend, checked_out):
    """Git refuses it until it belongs to this user, or is trusted: either way of the fix works."""
    if checked_out:
        git(tide.repository, "checkout", "--quiet", "tide")
    subprocess.run(["chown", "-R", "65534:65534", str(tide.repository)], check=True)
    if mend == "trust":
        # Git names its own folder first; where the branch is checked out, then that of the checkout.
        for folder in [tide.repository / ".git", tide.repository][: 1 + checked_out]:
            command = f"git config --global --add safe.directory {folder}"
            assert command in tide.refuses().fix
            subprocess.run(shlex.split(command), check=True)
        tide.commit()
    else:
        assert f"chown -R USER {tide.repository};" in tide.refuses().fix
    subprocess.run(["chown", "-R", str(os.geteuid()), str(tide.repository)], check=True)
    tide.lands()


def test_a_hook_that_refuses_is_quoted(tide):
    """The hook's own words are in the error; without the hook the snapshot lands."""
    hook = tide.repository / ".git" / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'no snapshots on Sundays'\nexit 1\n")
    hook.chmod(0o755)
    error = tide.refuses()
    assert "pre-receive hook declined" in error.what
    assert "no snapshots on Sundays" in error.what
    assert "hooks" in error.fix
    hook.unlink()
    tide.lands()


@pytest.mark.parametrize("damage", ["HEAD removed", "no repository"])
def test_a_folder_that_is_no_repository_is_named(tide, damage):
    """Moved away, as the fix says, it is kept, and a new repository is made."""
    if damage == "HEAD removed":
        (tide.repository / ".git" / "HEAD").unlink()
    else:
        shutil.rmtree(tide.repository / ".git")
    tide.mends(f"mv {tide.repository} {tide.repository}.old")
    assert Path(f"{tide.repository}.old").is_dir()


def test_history_that_was_rewritten_or_removed_is_no_obstacle(tide):
    """An amended tip, a foreign commit, a deleted tag, branch or repository: the next snapshot lands on what there is."""
    git(tide.repository, "checkout", "--quiet", "tide")
    git(tide.repository, "commit", "--quiet", "--amend", "-m", "changed")
    tide.lands()
    git(tide.repository, "checkout", "--quiet", "tide")
    (tide.repository / "note.txt").write_text("mind the weather")
    git(tide.repository, "add", "note.txt")
    git(tide.repository, "commit", "--quiet", "-m", "note")
    tide.lands()
    assert git(tide.repository, "show", "tide:note.txt") == "mind the weather"
    git(tide.repository, "tag", "--delete", git(tide.repository, "tag").split()[-1])
    tide.lands()
    git(tide.repository, "branch", "-m", "tide", "tide_old")
    tide.lands()
    shutil.rmtree(tide.repository)
    tide.lands()


def test_a_shallow_repository_takes_snapshots(tide, tmp_path):
    """A clone without history is as good a repository as another."""
    git(tmp_path, "clone", "--quiet", "--depth=1", "--branch=tide", f"file://{tide.repository}", "shallow")
    shallow = Dataset(tmp_path / "home", data_repository=str(tmp_path / "shallow"))
    shallow.day = tide.day
    shallow.lands()


def test_a_persons_git_settings_do_not_matter(tide, tmp_path):
    """Neither signed pushes, push options, careful bare repositories nor another hash stop a snapshot."""
    (tmp_path / "gitconfig").write_text(
        "[push]\n\tgpgSign = true\n\tpushOption = ci.skip\n[safe]\n\tbareRepository = explicit\n[init]\n\tdefaultBranch = x\n"
    )
    tide.lands()


def test_a_checked_out_branch_behind_a_url_is_named(tide):
    """From another machine nothing can be detached: the sentence names the branch, and what to do there."""
    words = (
        "error: refusing to update checked out branch: refs/heads/tide; To ssh://h/data; "
        "!\tabc:refs/heads/tide\t[remote rejected] (branch is currently checked out); Done"
    )
    explained = explain(words, "ssh://h/data")
    assert explained.what.startswith("the branch tide is in use in ssh://h/data")
    assert "checkout --detach" in explained.fix


def test_words_that_nobody_foresaw_are_given_whole():
    """Nothing of them is cut off, and the setting is named."""
    words = "fatal: " + "x" * 900 + " the end"
    assert explain(words, "/data").what == words
    assert "EVERGREEN_DATA_REPOSITORY" in explain(words, "/data").fix
