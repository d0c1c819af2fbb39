"""The webhook: `POST /alerts/{pack}`, for senders that sign or have a token. The answer comes when the alert is kept.

What is refused is tallied and written down, with its reason and without secrets (`refusals.py`). Requests are looked at
in this order: size and time of the body, authentication, rate, pack, content type, body; so a client without a secret
learns nothing else. Only a sender's token lets a body be as large as a notification of many alerts.
"""

from __future__ import annotations

import asyncio
import gc
import hmac
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from evergreen import database as db
from evergreen.errors import DatabaseError, SendersError, quoted
from evergreen.pack import NAME
from evergreen.settings import Settings
from evergreen.triggers import inbox, messages, signatures
from evergreen.triggers.inbox import NewAlert
from evergreen.triggers.messages import Messages
from evergreen.triggers.refusals import Refusals, Refused
from evergreen.triggers.senders import Sender, Senders

log = logging.getLogger("evergreen.webhook")

READ_WITHIN_S = 10.0
"""How long a body may take to arrive."""

WAITING = 1_000
"""How many requests may wait to be kept; more are sent away, so that a database that is away fills no memory."""

TRY_AGAIN_S = 5


SHOWN = 20
"""Maximum number of refused alerts that an answer names."""


class Kept(BaseModel):
    """The answer: the alert's id, and all ids where the message held several alerts."""

    alert: str
    alerts: list[str]
    refused: list[str] = []
    """The alerts of a notification that were not kept, each with why: the first SHOWN."""


class Refusal(HTTPException):
    """A request is not taken; `detail` says why."""


def make_app(settings: Settings, authenticated: Callable[..., Any]) -> FastAPI:
    """The web app. `authenticated` is the dependency that every route but the webhook carries: Airflow's own."""
    app = FastAPI(title="Evergreen", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_settled)
    door = Door(settings)

    @app.post(
        "/alerts/{pack}",
        status_code=202,
        responses=REFUSALS,
        response_model_exclude_defaults=True,
        openapi_extra=_bodies(),
    )
    async def take_alert(pack: str, request: Request) -> Kept:
        return await door.take(pack, request)

    @app.get("/metrics", dependencies=[Depends(authenticated)], response_class=Response, responses=UNAUTHENTICATED)
    def metrics() -> Response:
        from prometheus_client import CONTENT_TYPE_LATEST

        from evergreen.triggers.metrics import exposition

        try:
            return Response(exposition(settings), headers={"content-type": CONTENT_TYPE_LATEST})
        except DatabaseError as error:
            log.error("no metrics: %s", error)  # noqa: TRY400  the message says all
            raise _away("the events database cannot be used") from error

    return app


@asynccontextmanager
async def _settled(_app: FastAPI) -> AsyncIterator[None]:
    """What the server has imported by now stays: looking through Airflow's objects for garbage halts it for 0.4 s."""
    gc.freeze()
    yield


class Door:
    """Where alerts come in."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.senders = Senders(settings.senders)
        self.rate = SlidingWindowCounterRateLimiter(MemoryStorage())
        self.keeper = Keeper(settings.database_url)
        self.refusals = Refusals(settings.database_url)

    async def take(self, pack: str, request: Request) -> Kept:
        """Keep the alerts of a request; raises Refusal, which is noted."""
        sender = None
        try:
            senders = self._senders()
            # Only who has a token can post a notification: nobody else makes the server read so much.
            known = _of_token(senders, request.headers) is not None
            body = await _body(request, messages.GROUP_BYTES if known else messages.BODY_BYTES)
            sender = _authenticated(senders, request.headers, body)
            await self._count(sender)
            self._require(pack)
            found = _messages(sender, pack, request.headers, body)
            ids = await self.keeper.keep(pack, found.alerts)
        except Refusal as refusal:
            host = request.client.host if request.client and sender is None else None
            there, name = pack if self._is_there(pack) else None, sender.name if sender else None
            self.refusals.note(Refused(refusal.status_code, str(refusal.detail), there, name, host))
            raise
        for why in found.refused.values():
            self.refusals.note(Refused(422, f"one of several: {why}", pack, sender.name, None))
        refused = [messages.numbered(index, why) for index, why in itertools.islice(found.refused.items(), SHOWN)]
        return Kept(alert=ids[0], alerts=ids, refused=refused)

    def _senders(self) -> Collection[Sender]:
        try:
            return self.senders.now().values()
        except SendersError as error:
            log.error("no alert is taken: %s", error)  # noqa: TRY400  the message says all
            raise _away("the senders file cannot be used") from error

    async def _count(self, sender: Sender) -> None:
        """Count this request against the sender's rate, in this process."""
        limit = RateLimitItemPerMinute(sender.per_minute)
        if not await self.rate.hit(limit, sender.name):
            window = await self.rate.get_window_stats(limit, sender.name)
            wait = {"retry-after": str(max(1, math.ceil(window.reset_time - time.time())))}
            raise Refusal(429, f"{sender.name} posted {sender.per_minute} requests within a minute", wait)

    def _require(self, pack: str) -> None:
        if not self._is_there(pack):
            raise Refusal(404, f"there is no pack {quoted(pack)}")

    def _is_there(self, pack: str) -> bool:
        return bool(NAME.fullmatch(pack)) and (self.settings.packs / pack / "pack.yaml").is_file()


class Keeper:
    """Writes alerts down: what comes while one transaction is under way goes into the next, together."""

    def __init__(self, database_url: str) -> None:
        self.database_url = database_url
        self._waiting: list[tuple[str, Sequence[NewAlert], asyncio.Future[list[str]]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def keep(self, pack: str, alerts: Sequence[NewAlert]) -> list[str]:
        """Their ids, in order, once they are committed. Raises Refusal where they cannot be."""
        if len(self._waiting) >= WAITING:
            raise _away("too many alerts wait to be written down")
        kept: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._waiting.append((pack, alerts, kept))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        return await kept

    async def _write(self) -> None:
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                for pack in dict.fromkeys(pack for pack, _, _ in waiting):
                    await self._write_together(pack, [(alerts, kept) for name, alerts, kept in waiting if name == pack])
        finally:
            self._writing = None

    async def _write_together(
        self, pack: str, waiting: Sequence[tuple[Sequence[NewAlert], asyncio.Future[list[str]]]]
    ) -> None:
        """One transaction for all; whoever waits for a part of it gets its ids, or what went wrong."""
        together = [alert for alerts, _ in waiting for alert in alerts]
        ids: list[str] = []
        failure: Exception | None = None
        try:
            ids = await asyncio.to_thread(inbox.keep, db.connect(self.database_url), pack, together)
        except DatabaseError as error:
            log.error("alerts for %s are not kept: %s", pack, error)  # noqa: TRY400  the message says all
            failure = _away("the events database cannot be used")
        except Exception as error:  # noqa: BLE001 -- a fault of ours is raised where the request is answered
            failure = error
        for alerts, kept in waiting:
            own, ids = ids[: len(alerts)], ids[len(alerts) :]
            if kept.done():  # the request was given up meanwhile; its alert is kept all the same
                continue
            if failure is None:
                kept.set_result(own)
            else:
                kept.set_exception(failure)


def _authenticated(senders: Collection[Sender], headers: Mapping[str, str], body: bytes) -> Sender:
    """The sender who posted this: by the signature where there is one, else by the bearer token."""
    if "webhook-signature" in headers:
        keys = {signatures.key_of(secret): sender for sender in senders for secret in sender.signing}
        try:
            return keys[signatures.verify(keys, headers, body, time.time())]
        except signatures.SignatureError as error:
            raise _unknown(str(error)) from None
    if (sender := _of_token(senders, headers)) is None:
        raise _unknown("neither signed (webhook-signature) nor with a sender's token (Authorization: Bearer …)")
    return sender


def _of_token(senders: Collection[Sender], headers: Mapping[str, str]) -> Sender | None:
    """The sender whose bearer token this is; None for a signed request, and for an unknown token."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or "webhook-signature" in headers:
        return None
    given, owner = token.strip().encode(), None
    for sender in senders:
        for secret in sender.bearer:  # every one is compared, whatever matched: the time tells nothing
            if hmac.compare_digest(secret.encode(), given):
                owner = sender
    return owner


async def _body(request: Request, limit: int) -> bytes:
    """The body, when it is no larger than `limit` and arrives in time; nothing beyond that is read."""
    declared = request.headers.get("content-length", "0")
    too_large = len(declared) > 9 or not declared.isdecimal() or int(declared) > limit
    content = bytearray()
    try:
        async with asyncio.timeout(READ_WITHIN_S):
            async with aclosing(request.stream()) as chunks:
                while not too_large and (chunk := await anext(chunks, None)) is not None:
                    content += chunk
                    too_large = len(content) > limit
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {READ_WITHIN_S:.0f} s", CLOSE) from None
    except ClientDisconnect:
        raise Refusal(408, "the body ended early", CLOSE) from None
    if too_large:
        raise Refusal(413, f"the body is larger than {limit // 1024} KiB", CLOSE)
    return bytes(content)


def _messages(sender: Sender, pack: str, headers: Mapping[str, str], body: bytes) -> Messages:
    try:
        return messages.read(sender.name, pack, headers, body, datetime.now(UTC))
    except messages.ContentTypeError as error:
        raise Refusal(415, str(error)) from None
    except messages.TooLargeError:
        limit = messages.BODY_BYTES // 1024
        raise Refusal(413, f"the body is larger than {limit} KiB, and no notification of several alerts") from None
    except messages.MessageError as error:
        raise Refusal(422, str(error)) from None


def _unknown(why: str) -> Refusal:
    return Refusal(401, why, {"www-authenticate": "Bearer"})


def _away(why: str) -> Refusal:
    return Refusal(503, f"{why}; what is wrong stands in the server's log", {"retry-after": str(TRY_AGAIN_S)})


CLOSE = {"connection": "close"}
"""What is left of the body is not waited for."""


class Answer(BaseModel):
    """Why a request was not taken."""

    detail: str


UNAUTHENTICATED: dict[int | str, dict[str, Any]] = {status: {"model": Answer} for status in (401, 403, 503)}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Answer} for status in (401, 404, 408, 413, 415, 422, 429, 503)
}


def _bodies() -> dict[str, Any]:
    """The bodies that are read, for the schema of the app."""
    message, event, alert = (
        model.model_json_schema() for model in (messages.Message, messages.CloudEvent, messages.Notified)
    )
    notification = {
        "type": "object",
        "required": ["version", "alerts"],
        "properties": {
            "version": {"enum": ["4", "1"]},
            "alerts": {"type": "array", "items": alert, "minItems": 1},
        },
    }
    event["properties"]["data"] = message
    return {
        "requestBody": {
            "required": True,
            "content": {
                messages.JSON: {"schema": {"anyOf": [message, notification]}},
                messages.CLOUDEVENT: {"schema": event},
            },
        }
    }
