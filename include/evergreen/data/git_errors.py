"""Git's messages about the snapshots' repository, as one sentence each and a fix that works.

The patterns are those of Git 2.30 and newer, which is asked to speak English. A message that no pattern matches is given
whole. `tests/unit/data/test_repository.py` brings about these failures and does what each fix says.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHECKED_OUT = re.compile(
    r"(?P<ref>refs/heads/\S+)\s+\[remote rejected\] \((?:branch is currently checked out|Working directory has .*?changes"
    r"|Up-to-date check failed|Could not update working tree.*?)\)"
)
"""A push to a branch that is checked out: refused, or, by a repository that updates its checkout, not possible."""


@dataclass(frozen=True)
class Explanation:
    """A failure of git in one sentence, and what to do about it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Cause:
    """A kind of failure: the words by which it is known, and its explanation with the names of groups in braces.

    Beside the groups there are `url`, `place` (the URL for a shell), `git` (the command that works there) and `words`.
    """

    pattern: re.Pattern[str]
    what: str
    fix: str
    where: Literal["anywhere", "folder", "server"] = "anywhere"


CAUSES = (
    Cause(
        CHECKED_OUT,
        "the branch {name} is in use in {url}: it is checked out, or a rebase or bisect of it has not ended",
        "`{git} status` says which: end it with `{git} rebase --quit` or `{git} bisect reset`, then `{git} checkout "
        "--detach`. Where the folder of the checkout is gone: {git} worktree prune",
    ),
    Cause(
        re.compile(r"Unable to create '(?P<file>[^']+\.lock)': File exists"),
        "{file} exists: another git process uses the repository, or was killed in it",
        "wait until it has ended; if no git process runs there: rm {file}",
    ),
    Cause(
        re.compile(r"cannot lock ref '(?P<wanted>[^']+)': '(?P<ref>refs/heads/[^']+)' exists; cannot create"),
        "the branch {name} is in the way of {wanted}: git cannot have both in {url}",
        "rename it: {git} branch -m {name} {other}",
    ),
    Cause(
        re.compile(r"cannot lock ref '(?P<wanted>[^']+)': '(?P<ref>refs/tags/[^']+)' exists; cannot create"),
        "the tag {name} is in the way of {wanted}: git cannot have both in {url}",
        "rename it: {git} tag {other} {ref} && {git} tag --delete {name}",
    ),
    Cause(
        re.compile(r"detected dubious ownership in repository at '(?P<file>[^']+)'"),
        "{file} belongs to another user, so git refuses to use it",
        "give it to the user that runs Evergreen: chown -R USER {place}; or trust it as it is: git config --global --add "
        "safe.directory {file}",
    ),
    Cause(re.compile(r"git is not installed"), "git is not installed", "install git 2.30 or newer, then run again"),
    Cause(
        re.compile(r"No space left on device|Disk quota exceeded"),
        "its disk is full: {words}",
        "make room on the disk of {url}, then run again",
    ),
    Cause(
        re.compile(r"\[remote rejected\] \((?P<reason>[^)]+)\)"),
        "it refuses the push ({reason}): {words}",
        "let its hooks, or its server's rules for branches, take new commits and tags, then run again",
    ),
    Cause(
        re.compile(r"does not appear to be a git repository|not a git repository"),
        "{url} does not appear to be a git repository, or is a damaged one",
        "move it away, and the next run makes a new one: mv {place} {place}.old; or set EVERGREEN_DATA_REPOSITORY to "
        "another place",
        where="folder",
    ),
    Cause(
        re.compile(r"Permission denied|insufficient permission|Read-only file system"),
        "this user may not write there: {words}",
        "give {url} to the user that runs Evergreen, or make it writable, then run again",
        where="folder",
    ),
    Cause(
        re.compile(r"Permission denied|Authentication failed|could not read (?:Username|Password)|error: 40[13]"),
        "its server does not let this user in: {words}",
        "give git an account that may push there: an SSH key, a credential helper or ~/.netrc",
        where="server",
    ),
    Cause(
        re.compile(
            r"resolve host|Connection (?:refused|timed out|reset)|Failed to connect|No route|did not answer within"
        ),
        "it cannot be reached: {words}",
        "check the network and EVERGREEN_DATA_REPOSITORY, then run again",
    ),
    Cause(
        re.compile(""),
        "{words}",
        "see that it is a git repository one can push to (EVERGREEN_DATA_REPOSITORY), then run again",
    ),
)
"""The first that matches explains a failure; the last one always does."""


def explain(words: str, url: str) -> Explanation:
    """Explain what git said when it was used on the repository at `url`."""
    is_folder = Path(url).is_absolute()
    for cause in CAUSES:
        match = cause.pattern.search(words)
        if match is not None and cause.where in ("anywhere", "folder" if is_folder else "server"):
            git = f"git -C {shlex.quote(url)}" if is_folder else "git, in that repository:"
            fields = match.groupdict() | {"url": url, "place": shlex.quote(url), "git": git, "words": words}
            if "file" in fields:
                fields["file"] = shlex.quote(fields["file"].replace("/./", "/"))
            if "ref" in fields:
                fields["name"] = fields["ref"].split("/", 2)[2]
                fields["other"] = fields["name"].replace("/", "-") + "-kept"
            return Explanation(cause.what.format(**fields), fix=cause.fix.format(**fields))
    raise AssertionError("the last cause matches everything")
