"""Airflow triggers: one wakes the admission DAG while alerts are due, one a question that nobody needs to answer any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from airflow.providers.standard.triggers.hitl import HITLTrigger, update_hitl_detail_response
from airflow.sdk.exceptions import AirflowRuntimeError
from airflow.triggers.base import BaseEventTrigger, TriggerEvent

from evergreen import database as db
from evergreen.settings import Settings

POLL_S = 0.2
ANSWER_POLL_S = 2.0
APART_S = 1.0
"""How long until it rings for another alert of a pack that it has just rung for."""
AGAIN_S, AGAIN_AT_MOST_S = 2.0, 60.0
"""How long until it rings again for what stays due, at first and in the end; doubled from ring to ring."""


class InboxBell(BaseEventTrigger):
    """Rings at once for a pack that has an alert due and had none, within a second for one alert more.

    For what stays due it rings less and less often.

    It remembers nothing that matters: restarted, it rings for whatever is due. A database that is away is looked for
    again at the next poll; alerts that nobody is woken for are found by the admission DAG's cron.
    """

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return f"{InboxBell.__module__}.{InboxBell.__qualname__}", {}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """An event with the names of the packs due, whenever the bell rings; for ever."""
        known: dict[str, int] = {}
        rung_at, wait, away = 0.0, AGAIN_S, False
        while True:
            try:
                due = await asyncio.to_thread(_due)
                away = False
            except Exception as error:  # noqa: BLE001 -- whatever keeps it from looking, Airflow would not start it again
                due = {}
                if not away:
                    self.log.warning("the inbox cannot be read, and is looked at again until it can: %s", error)
                away = True
            quiet = time.monotonic() - rung_at
            new = due.keys() - known.keys() or (quiet >= APART_S and due.items() - known.items())
            if new or (due and quiet >= wait):
                wait = AGAIN_S if new else min(2 * wait, AGAIN_AT_MOST_S)
                rung_at, known = time.monotonic(), due
                yield TriggerEvent({"packs": sorted(due)})
            else:
                known = {pack: position for pack, position in known.items() if pack in due}
            await asyncio.sleep(POLL_S)


def _due() -> dict[str, int]:
    # Imported here: the DAG processor reads this module every few seconds, and looks at no inbox.
    from evergreen.triggers import inbox

    return inbox.newest_due(db.connect(Settings.from_env().database_url), datetime.now(UTC))


class AnswerBell(HITLTrigger):
    """Waits for a person, the time-out, or the end of what the question is about: whichever comes first.

    An answer on Airflow's page resumes the task by itself; one that came before the task slept, or to a try of it that
    then failed, is found here.
    """

    def __init__(self, *, pack: str, run: str, version: int | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.pack = pack
        self.run_id = run
        self.version = version

    def serialize(self) -> tuple[str, dict[str, Any]]:
        _, more = super().serialize()
        own = {"pack": self.pack, "run": self.run_id, "version": self.version}
        return f"{AnswerBell.__module__}.{AnswerBell.__qualname__}", {**more, **own}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """One event."""
        while True:
            if ended := await asyncio.to_thread(self._overtaken):
                await asyncio.to_thread(self._show, *ended)
                yield TriggerEvent({"overtaken": ended[0]})
                return
            try:
                if self.timeout_datetime and self.timeout_datetime < datetime.now(UTC):
                    event = await self._handle_timeout()
                else:
                    event = await self._handle_response()
            except AirflowRuntimeError as error:
                if (error.error.detail or {}).get("status_code") != HTTPStatus.NOT_FOUND:
                    raise
                event = TriggerEvent({"unasked": True})  # the try before failed before it could ask
            if event is not None:
                yield event
                return
            await asyncio.sleep(ANSWER_POLL_S)

    def _overtaken(self) -> tuple[str, str] | None:
        """Why no answer is needed any more, and what it was, if one was given elsewhere; else what stands for none."""
        from evergreen.errors import EvergreenError
        from evergreen.registry import approval

        try:
            database = db.connect(Settings.from_env().database_url)
            why = approval.overtaken(database, self.pack, self.run_id, self.version)
            choice = approval.state(database, self.pack, self.run_id, self.version).body.get("choice", "reject")
        except EvergreenError as error:  # a database that is away is asked again
            self.log.warning("whether the answer is still waited for cannot be told: %s", error)
            return None
        return (why, choice) if why else None

    def _show(self, why: str, choice: str) -> None:
        """Have the page say so in place of its buttons, unless a person was quicker: then that is what it says."""
        try:
            update_hitl_detail_response(self.ti_id, chosen_options=[choice], params_input={"comment": why})
        except Exception as error:  # noqa: BLE001 -- the events decide, whatever the page says
            self.log.warning("the page goes on asking although the question has ended, %s: %s", why, error)
