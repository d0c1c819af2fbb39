"""One class per failure a user can cause; each message names the place, the value and the fix.

An `EvergreenError` is meant for a person: the CLI prints it without a traceback, a task log shows it last. Anything
else that escapes is a fault of ours. Messages stay on one screen: at most five examples; the rest is in `__cause__`
or in an object of the store that the message names. What they quote was written by others: it may be of any length, and
hold characters that a terminal obeys. `one_screen` bounds and escapes every message, `quoted` a single value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

SCREEN = 4_000
"""Maximum number of characters of a message: fifty lines of a terminal."""

LINES = 40
"""Maximum number of lines of a message."""

LINE = 1_000
"""Maximum number of characters of one line of a message."""

VALUE = 80
"""Maximum number of characters of a quoted value."""

RAW = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""Characters that a terminal obeys rather than shows, or that UTF-8 cannot encode; tabs and line ends are none of them."""


class EvergreenError(Exception):
    """A failure with a cause that its reader can mend.

    `what` says what is wrong and names the file and the value; `fix` says what to do about it.
    """

    def __init__(self, what: str, *, fix: str) -> None:
        self.what = one_screen(what)
        self.fix = one_screen(fix)
        super().__init__(f"{self.what}\n  fix: {self.fix}")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.fix))


def _rebuild(cls: type[EvergreenError], what: str, fix: str) -> EvergreenError:
    error = cls.__new__(cls)
    EvergreenError.__init__(error, what, fix=fix)
    return error


class SettingsError(EvergreenError):
    """An environment variable or a place it names cannot be used."""


class DatabaseError(EvergreenError):
    """The events database is unreachable, of another revision, or its chain is broken."""


class LeaseHeldError(EvergreenError):
    """Another run of the same pack is acting; this one may try again when it has finished."""


class PackError(EvergreenError):
    """`pack.yaml` or the pack's Python is wrong."""


class SourceError(EvergreenError):
    """The source cannot be read, or what it holds cannot be the dataset: columns, types, times, emptiness."""


class UnreachableError(SourceError):
    """The source does not answer, or not well, and may do so soon: worth trying again."""


class StaleDataError(SourceError):
    """The newest data is older than the pack's `data.max_staleness`."""


class ValidationError(EvergreenError):
    """Expectations failed past the tolerance; the run ends here and the champion stays."""


class StoreError(EvergreenError):
    """An object or a snapshot cannot be written, found, or trusted; or the remote cannot be reached."""


class JobError(EvergreenError):
    """A job failed, was killed, or ran past its time; its log says more."""


class TrainingError(JobError):
    """The training function failed or left no usable model folder."""


class EvaluationError(EvergreenError):
    """A model could not be scored, or its predictions are not what was asked for."""


class RegistryError(EvergreenError):
    """The MLflow registry cannot be reached, or does not hold what was asked for."""


class StageError(EvergreenError):
    """A stage was asked for out of order, or its record cannot be read."""


class SendersError(EvergreenError):
    """The senders file cannot be used; its secrets are in no message."""


class AlertError(EvergreenError):
    """An alert was not taken: nobody answered, or the answer was no."""


def visible(text: str) -> str:
    """Escape the control and direction characters of a text as Python writes them in a literal."""
    return RAW.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_screen(text: str) -> str:
    """Bound a message to one screen, cut in the middle, and make it `visible`."""
    lines = [shortened(line, LINE) for line in visible(text).split("\n")]
    if len(lines) > LINES:
        lines[LINES // 2 : 1 - LINES // 2] = [f"… {len(lines) - LINES + 1:,} lines left out …"]
    return shortened("\n".join(lines), SCREEN)


def quoted(value: object) -> str:
    """`value` in quotes, as `repr` writes it, its middle left out where it is longer than VALUE characters."""
    return shortened(visible(repr(value)), VALUE)


def shortened(text: str, length: int) -> str:
    """Leave out the middle of a text that is longer than `length`, and say how much."""
    if len(text) <= length:
        return text
    left_out = f" … {len(text) - length:,} characters left out … "
    head = (length - len(left_out)) * 2 // 3
    tail = length - len(left_out) - head
    return f"{text[:head]}{left_out}{text[-tail:]}"


def masked(url: str) -> str:
    """A URL, or a text with some, without passwords."""
    url = re.sub(r"(?<=://)([^/?#@:\s]*):[^/?#\s]+@", r"\1:***@", url)
    return re.sub(r"([?&](?:password|passwd|pwd)=)[^&#\s]*", r"\1***", url)


def nearest(value: str, known: Iterable[str]) -> str:
    """`did you mean …?` for the known name closest to `value`, or the known names when none is close."""
    names = sorted(known)
    # The time to compare two texts grows with the product of their lengths.
    short = [name for name in names if len(name) <= LINE] if len(value) <= LINE else []
    close = difflib.get_close_matches(value, short, n=1, cutoff=0.6)
    if close:
        return f"did you mean {quoted(close[0])}?"
    shown = ", ".join(shortened(name, VALUE) for name in names[:12]) + (" …" if len(names) > 12 else "")
    return f"known: {shown}" if names else "none is known"
