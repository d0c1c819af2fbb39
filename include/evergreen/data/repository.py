"""The git repository of snapshots: a branch a dataset, a tag a snapshot, and notes on branches of their own.

A commit is made without a checkout, in a repository that lives as long as the commit takes: nothing of it is shared, so
nothing needs a lock, and git itself decides who was first.
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from evergreen.data.git_errors import CHECKED_OUT
from evergreen.run import Ref, Value

log = logging.getLogger("evergreen")

ATTEMPTS = 4
PAUSE_S = 0.15
"""Before the second attempt; three times as long before each further one: 2 s in all."""
GIT_TIMEOUT_S = 120
HTTP = ("http", "https")
REMOTE = "store"
"""The DVC remote's name: credentials go under it, as in `dvc remote modify --global store …`."""
MAIN = "main"
NOTES = "refs/heads/evergreen-ledger/"
"""Branches of notes; no dataset's name has a hyphen."""
IDENTITY = "Evergreen <evergreen@localhost>"
OTHER_REPOSITORY = frozenset(
    {
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_COMMON_DIR",
        "GIT_NAMESPACE",
        "GIT_PREFIX",
        "GIT_AUTHOR_DATE",
        "GIT_COMMITTER_DATE",
    }
)
"""What git tells the commands it runs, a hook say, about the repository it runs them for."""
README = """# Snapshots

Datasets as Evergreen's runs saw them, versioned with DVC: a branch for each dataset, a tag for each snapshot.

    git branch --all; git tag                               # what there is
    dvc list THIS_REPOSITORY DATASET --rev TAG              # the files of a snapshot
    dvc get THIS_REPOSITORY DATASET --rev TAG               # a snapshot's files, anywhere
    git clone THIS_REPOSITORY; git checkout DATASET; dvc pull

Where this folder was moved since a snapshot was made, a clone of it is told where the store lies now:

    dvc remote modify --local store url FOLDER_OF_THE_STORE

A dataset that is checked out here stays at its commit when a newer snapshot comes, detached: check it out again.
Branches evergreen-ledger/PACK note the end of a pack's chain of events, to compare with: `evergreen ledger verify`.
"""

A = TypeVar("A")


class Commit(Value):
    """A version of a dataset in the snapshot repository."""

    revision: str
    """The git commit."""
    tag: str
    hash: str
    """The DVC tree hash: md5 with `.dir`."""
    size: int
    new: bool
    """False when the dataset was committed before, just so."""


@dataclass(frozen=True)
class Version:
    """What is to be committed."""

    dataset: str
    tree: Ref
    files: int
    time: datetime
    message: str

    @property
    def branch(self) -> str:
        return f"refs/heads/{self.dataset}"

    @property
    def tag(self) -> str:
        return f"{self.dataset}/{self.time.astimezone(UTC):%Y%m%dT%H%M%SZ}-{self.tree.hash[:8]}"

    @property
    def pointer(self) -> bytes:
        """`<dataset>.dvc`, as stock DVC writes it."""
        return (
            f"outs:\n- md5: {self.tree.hash}\n  size: {self.tree.size}\n  nfiles: {self.files}\n"
            f"  hash: md5\n  path: {self.dataset}\n"
        ).encode()


class GitError(Exception):
    """git failed; its own words, all of them."""


class LostError(GitError):
    """Another push came first; `tip` is where the branch was before it."""

    def __init__(self, words: str, tip: str) -> None:
        super().__init__(words)
        self.tip = tip


class Repository:
    """The git repository of snapshots: one branch a dataset, never checked out, a README on `main`, and notes."""

    def __init__(self, url: str, remote: str) -> None:
        self._url = url
        self._remote = remote

    def commit(self, version: Version, scratch: Path) -> Commit:
        """Commit on top of the branch's tip, and tag that."""
        return self._attempts(partial(self._commit, version), scratch)

    def tagged(self, tag: str, scratch: Path) -> str:
        """Return the revision that `tag` is at; empty where there is no such tag."""
        return self._attempts(partial(self._tip, f"refs/tags/{tag}"), scratch)

    def note(self, branch: str, text: str, scratch: Path) -> None:
        """Commit `text`, and no file, on top of the branch's tip, unless that says it."""
        self._attempts(partial(self._note, branch, text), scratch)

    def notes(self, branch: str, scratch: Path) -> list[str]:
        """What the commits of a branch say, oldest first."""
        return self._attempts(partial(self._notes, branch), scratch)

    def noted(self, prefix: str, scratch: Path) -> list[str]:
        """The branches whose name begins with `prefix`, without it."""
        return self._attempts(partial(self._noted, prefix), scratch)

    def rehearse(self, scratch: Path) -> None:
        """Ask the repository whether it would take a new branch; nothing is pushed. Raises GitError."""
        _git("init", "--quiet", "--bare", ".", cwd=scratch)
        tree = _git("hash-object", "-w", "-t", "tree", "--stdin", cwd=scratch).decode().strip()
        commit = _git("commit-tree", tree, "-m", "A rehearsal", cwd=scratch).decode().strip()
        _git("push", "--quiet", "--dry-run", self._url, f"{commit}:refs/heads/evergreen-doctor", cwd=scratch)

    def _attempts(self, act: Callable[[Path], A], scratch: Path) -> A:
        """`act` in an empty folder; tried again when git fails or another commit comes first."""
        lost_at: set[str] = set()
        failures = 0
        while True:
            try:
                with TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
                    return act(Path(folder))
            except GitError as error:
                # To lose at a tip for the first time is no failure: another commit landed, so somebody gets on.
                if isinstance(error, LostError) and error.tip not in lost_at:
                    lost_at.add(error.tip)
                else:
                    failures += 1
                if failures == ATTEMPTS:
                    raise
            pause(failures)

    def _commit(self, version: Version, clone: Path) -> Commit:
        """One attempt, from a bare repository in the empty folder `clone` that knows nothing but the branch's tip."""
        known = partial(Commit, hash=version.tree.hash, size=version.tree.size)
        tags, tip = self._look(version, clone)
        if version.tag in tags:
            return known(revision=tags[version.tag], tag=version.tag, new=False)
        _git("init", "--bare", "--quiet", "--template=", ".", cwd=clone)
        if tip:
            _git("fetch", "--quiet", "--depth=1", "--no-tags", self._url, version.branch, cwd=clone)
            if self._pointer(version, tip, clone) == version.pointer:
                tagged = [tag for tag, revision in tags.items() if revision == tip]
                if not tagged:
                    self._push(tip, [f"refs/tags/{version.tag}"], tip, clone)
                return known(revision=tip, tag=min(tagged, default=version.tag), new=False)
        revision = self._write(version, tip, clone)
        self._push(revision, [version.branch, f"refs/tags/{version.tag}"], tip, clone)
        return known(revision=revision, tag=version.tag, new=True)

    def _note(self, branch: str, text: str, clone: Path) -> None:
        tip = self._tip(branch, clone)
        _git("init", "--bare", "--quiet", "--template=", ".", cwd=clone)
        if tip:
            _git("fetch", "--quiet", "--depth=1", "--no-tags", self._url, tip, cwd=clone)
            if _said(tip, clone) == [text]:
                return
        tree = _git("mktree", cwd=clone).decode().strip()
        parents = ["-p", tip] if tip else []
        made = _git("commit-tree", tree, *parents, "-m", text, cwd=clone).decode().strip()
        self._push(made, [branch], tip, clone)

    def _notes(self, branch: str, clone: Path) -> list[str]:
        tip = self._tip(branch, clone)
        if not tip:
            return []
        _git("init", "--bare", "--quiet", "--template=", ".", cwd=clone)
        _git("fetch", "--quiet", "--no-tags", self._url, branch, cwd=clone)
        return _said(tip, clone)

    def _noted(self, prefix: str, clone: Path) -> list[str]:
        if self._is_absent:
            return []
        lines = _git("ls-remote", "--quiet", self._url, f"{prefix}*", cwd=clone).decode().splitlines()
        return sorted(line.split("\t")[1].removeprefix(prefix) for line in lines)

    def _tip(self, branch: str, clone: Path) -> str:
        """The revision of a branch's tip; empty where there is none."""
        if self._is_absent:
            return ""
        return _git("ls-remote", "--quiet", self._url, branch, cwd=clone).decode().partition("\t")[0]

    @property
    def _is_absent(self) -> bool:
        """Whether nobody has made the repository yet: its path is free."""
        home = Path(self._url)
        return home.is_absolute() and not home.exists()

    def _look(self, version: Version, clone: Path) -> tuple[dict[str, str], str]:
        """The revisions of the dataset's tags that share the tree's digits, and of the branch's tip (none: empty)."""
        pattern = f"refs/tags/{version.dataset}/*-{version.tree.hash[:8]}"
        lines = _git("ls-remote", "--quiet", self._url, version.branch, pattern, cwd=clone).decode().splitlines()
        refs = {ref: revision for revision, ref in (line.split("\t") for line in lines)}
        tip = refs.pop(version.branch, "")
        return {ref.removeprefix("refs/tags/"): revision for ref, revision in refs.items()}, tip

    def _pointer(self, version: Version, tip: str, clone: Path) -> bytes | None:
        try:
            return _git("cat-file", "blob", f"{tip}:{version.dataset}.dvc", cwd=clone)
        except GitError:  # The branch's tip has no such file.
            return None

    def _write(self, version: Version, tip: str, clone: Path) -> str:
        """Write the commit: the tip's files, and over them those that make the branch a DVC repository."""
        files = {
            f"{version.dataset}.dvc": version.pointer,
            ".gitignore": f"/{version.dataset}\n".encode(),
            **_dvc_files(self._remote),
        }
        message = version.message.encode()
        stream = [
            b"commit refs/heads/new\nmark :1\n",
            f"author {IDENTITY} {int(version.time.timestamp())} +0000\n".encode(),
            f"committer {IDENTITY} {int(time.time())} +0000\n".encode(),
            b"data %d\n%s\n" % (len(message), message),
            f"from {tip}\n".encode() if tip else b"",
            *(b"M 100644 inline %s\ndata %d\n%s\n" % (name.encode(), len(data), data) for name, data in files.items()),
            b"get-mark :1\n",
        ]
        return (
            _git("fast-import", "--quiet", "--done", cwd=clone, stdin=b"".join([*stream, b"done\n"])).decode().strip()
        )

    def _push(self, revision: str, refs: list[str], tip: str, clone: Path) -> None:
        """All refs or none; LostError when the branch has moved or the tag appeared since we looked."""
        targets = [f"{revision}:{ref}" for ref in refs]
        try:
            _git("push", "--atomic", "--porcelain", self._url, *targets, cwd=clone)
        except GitError as error:
            if "[rejected]" in str(error):
                raise LostError(str(error), tip) from error
            if not (CHECKED_OUT.search(str(error)) and self._detach(refs[0], clone)):
                raise
            _git("push", "--atomic", "--porcelain", self._url, *targets, cwd=clone)

    def _detach(self, branch: str, cwd: Path) -> bool:
        """Detach every checkout of `branch` in a repository on this machine; whether there was one.

        Git refuses pushes to a branch that is checked out, for its files would then be those of another commit. Detached,
        the checkout keeps its commit and its files, changed ones too, and is out of the way.
        """
        if not Path(self._url).is_absolute():
            return False
        detached = False
        for entry in _git("-C", self._url, "worktree", "list", "--porcelain", cwd=cwd).decode().split("\n\n"):
            told = dict(line.partition(" ")[::2] for line in entry.splitlines())
            if told.get("branch") == branch and "prunable" not in told:
                checkout = told["worktree"]
                _git("-C", checkout, "update-ref", "--no-deref", "HEAD", told["HEAD"], cwd=cwd)
                name = branch.removeprefix("refs/heads/")
                log.warning(
                    "%s: the checkout of %s stays at %s, detached: `git checkout %s` there shows what is new",
                    *(checkout, name, told["HEAD"][:12], name),
                )
                detached = True
        return detached

    def make(self) -> None:
        """Make the repository where its path is free: whole, or not at all."""
        home = Path(self._url)
        if not home.is_absolute() or (home.exists() and (not home.is_dir() or any(home.iterdir()))):
            return
        home.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=home.parent, prefix=f".{home.name}-") as folder:
            made = self._introduction(Path(folder))
            with suppress(OSError):  # Another process was first: its repository is as good.
                made.rename(home)

    def introduce(self, scratch: Path) -> None:
        """Push the README to `main` of an empty repository."""
        if _git("ls-remote", "--quiet", self._url, cwd=scratch):
            return
        with TemporaryDirectory(dir=scratch) as folder:
            _git("push", "--quiet", self._url, MAIN, cwd=self._introduction(Path(folder)))

    def _introduction(self, folder: Path) -> Path:
        """A repository in `folder` whose only commit, on `main`, says what it holds."""
        made = folder / "repository"
        _git("init", "--quiet", f"--initial-branch={MAIN}", str(made), cwd=folder)
        (made / ".dvc").mkdir()
        for name, content in {"README.md": README.encode(), **_dvc_files(self._remote)}.items():
            (made / name).write_bytes(content)
        _git("add", "--all", cwd=made)
        _git("commit", "--quiet", "--message=Say what this repository holds", cwd=made)
        return made


def _said(tip: str, clone: Path) -> list[str]:
    """The messages of a commit and of those before it that are there, oldest first."""
    return _git("log", "--reverse", "--format=%B%x00", tip, cwd=clone).decode().replace("\n", "").split("\0")[:-1]


def remote_of(url: str) -> dict[str, str]:
    """What DVC is told of the remote. Over HTTP, objects are PUT, as every WebDAV server takes them."""
    return {"url": url, **({"method": "PUT"} if url.startswith(tuple(f"{name}://" for name in HTTP)) else {})}


def _dvc_files(remote: str) -> dict[str, bytes]:
    """What makes a git tree a DVC repository whose default remote is `remote`."""
    config = (
        f"[core]\n    analytics = false\n    remote = {REMOTE}\n"
        '[cache]\n    type = "reflink,hardlink,symlink,copy"\n'
        f"['remote \"{REMOTE}\"']\n"
    ) + "".join(f'    {name} = "{value}"\n' for name, value in remote_of(remote).items())
    return {
        ".dvc/config": config.encode(),
        ".dvc/.gitignore": b"/config.local\n/tmp\n/cache\n",
        ".dvcignore": b"# Patterns of files that DVC should not look at.\n",
    }


def _git(*arguments: str, cwd: Path, stdin: bytes = b"") -> bytes:
    """What git prints; GitError with its last words. Its user's name, hooks and signing have no part in it."""
    settings = (
        *("core.hooksPath=/dev/null", "commit.gpgSign=false", "gc.auto=0", "maintenance.auto=false"),
        *("push.gpgSign=false", "push.pushOption=", "safe.bareRepository=all"),
    )
    name, _, address = IDENTITY.rstrip(">").partition(" <")
    environment = {key: value for key, value in os.environ.items() if key not in OTHER_REPOSITORY} | {
        "GIT_AUTHOR_NAME": name,
        "GIT_AUTHOR_EMAIL": address,
        "GIT_COMMITTER_NAME": name,
        "GIT_COMMITTER_EMAIL": address,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_DEFAULT_HASH": "sha1",
        "LC_ALL": "C",
    }
    command = ["git", *(part for setting in settings for part in ("-c", setting)), *arguments]
    try:
        done = subprocess.run(
            command, cwd=cwd, input=stdin, env=environment, capture_output=True, timeout=GIT_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise GitError("git is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise GitError(f"git {arguments[0]} did not answer within {GIT_TIMEOUT_S} s") from error
    if done.returncode:
        lines = (done.stderr + done.stdout).decode(errors="replace").splitlines()
        words = [line.removeprefix("remote:").strip() for line in lines if not line.startswith("hint:")]
        raise GitError("; ".join(filter(None, words)))
    return done.stdout


def pause(failures: int) -> None:
    time.sleep(PAUSE_S * 3 ** (failures - 1) * random.uniform(0.5, 1.5))  # noqa: S311 - to part rivals, not to hide
