"""What the webhook refused: tallied, and written down at most once a minute, whoever posts and how often.

A refusal is an event of the home's own chain, not of a pack's: who has no secret can neither make a chain longer than
by one event a minute, nor keep an alert waiting. Bodies, secrets and tokens are in none of it. The log has the first
of each kind in each minute, and so what a server had not written down when it ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any, NamedTuple

from evergreen import database as db
from evergreen.database import HOME, Database
from evergreen.errors import DatabaseError

log = logging.getLogger("evergreen.webhook")

EVERY_S = 60.0
"""How far apart two events of a process are."""
KNOWN, UNKNOWN = 40, 10
"""How many different refusals an event tells apart: of senders that are known, and of anybody."""
REASON = 200
"""How long a reason may be."""


class Refused(NamedTuple):
    """What is counted together."""

    status: int
    reason: str
    pack: str | None
    """None where there is no such pack, or too much to tell apart."""
    sender: str | None
    """None: nobody who is known."""
    address: str | None
    """Where somebody unknown posted from."""


class Refusals:
    """The refusals of this process that are not written down yet."""

    def __init__(self, database_url: str) -> None:
        self.database_url = database_url
        self._tally: Counter[Refused] = Counter()
        self._since = datetime.now(UTC)
        self._written_at = -EVERY_S
        self._writing: asyncio.Task[None] | None = None

    def note(self, refused: Refused) -> None:
        """Count one more. The first after a quiet minute is written at once, the others when the minute is over."""
        refused = refused._replace(reason=refused.reason[:REASON])
        if refused not in self._tally and self._is_full(refused):
            refused = Refused(refused.status, "others, too many to tell apart", None, refused.sender and "others", None)
        if refused not in self._tally:
            where = refused.sender or f"nobody known at {refused.address or '?'}"
            log.warning("refused an alert for %s from %s: %d: %s", refused.pack, where, refused.status, refused.reason)
        if not self._tally:
            self._since = datetime.now(UTC)
        self._tally[refused] += 1
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    def _is_full(self, refused: Refused) -> bool:
        alike = sum((each.sender is None) == (refused.sender is None) for each in self._tally)
        return alike >= (UNKNOWN if refused.sender is None else KNOWN)

    async def _write(self) -> None:
        try:
            while self._tally:
                await asyncio.sleep(max(0.0, self._written_at + EVERY_S - time.monotonic()))
                body, self._tally = self._body(), Counter()
                self._written_at = time.monotonic()
                try:
                    await asyncio.to_thread(db.connect(self.database_url).append, HOME, "refused", body)
                except DatabaseError as error:
                    log.error("refusals are not written down: %s: %s", error.what, body["refused"])  # noqa: TRY400
        finally:
            self._writing = None

    def _body(self) -> dict[str, Any]:
        found = [{**refused._asdict(), "times": times} for refused, times in self._tally.most_common()]
        return {"since": self._since.isoformat(), "refused": found}


def refused_of(
    database: Database, pack: str | None = None, *, since: datetime | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """What was refused, newest first: since, until, status, reason, pack, sender, address, times; of `pack` or of all.

    `limit` is of the events that are read; each holds what was refused within a minute.
    """
    events = database.events(HOME, kind="refused", since=since, newest_first=True, limit=limit)
    return [
        {"since": event.body["since"], "until": event.at.isoformat(), **refused}
        for event in events
        for refused in event.body["refused"]
        if pack is None or refused["pack"] == pack
    ]
