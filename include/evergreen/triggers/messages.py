"""What senders post, read as new alerts: our own JSON, a CloudEvent around it, Alertmanager's and Grafana's notifications.

Every text, number and field is checked before it becomes an alert. Control characters in texts are kept as escapes. An
alert of a notification that cannot be kept does not refuse the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from evergreen.errors import quoted, visible
from evergreen.pack import parse_instant
from evergreen.triggers.inbox import NewAlert
from evergreen.triggers.signatures import TOLERANCE

REASON = 500
"""How long a reason may be."""

ID = 200
"""How long a sender's id of a message may be."""

AT_ONCE = 1_000
"""Maximum number of alerts that are kept of a notification."""

BODY_BYTES = 64 * 1024
"""Maximum size of one alert: of a body that holds one, or of its part of a notification."""

GROUP_BYTES = 1024 * 1024
"""Maximum size of a notification, which holds up to AT_ONCE alerts."""

Model = TypeVar("Model", bound=BaseModel)

_Where = tuple["_Where", str | int] | None
"""A place in a JSON value: the place around it, and the key or index there; None at the top."""

JSON = "application/json"
CLOUDEVENT = "application/cloudevents+json"


class MessageError(Exception):
    """A message cannot be an alert; says which field, and why."""


class ContentTypeError(Exception):
    """A message is of a type that is not read."""


class TooLargeError(Exception):
    """A message that is no notification is larger than BODY_BYTES."""


class Messages(NamedTuple):
    """The alerts of a body."""

    alerts: list[NewAlert]
    refused: dict[int, str]
    """Why an alert of a notification is not kept, by its index there; the text begins with `alert`."""


def _line(value: str) -> str:
    """A text on one line."""
    if not (line := " ".join(value.split())):
        raise ValueError("is empty")
    return line


def _json_type(value: str) -> str:
    if value.split(";", 1)[0].strip().lower() != JSON:
        raise ValueError(f"is not {JSON}")
    return value


class Message(BaseModel):
    """Our own body: that a model may need retraining, and why."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reason: Annotated[str, Field(min_length=1, max_length=REASON), AfterValidator(_line)]
    as_of: Annotated[str, Field(max_length=40)] | None = None
    """A date or an instant, which is not to come: what the run that answers should pretend to be at."""
    evidence: dict[str, Any] | None = None
    fingerprint: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """What makes two alerts the same complaint; the reason's hash when it is not said."""
    pack: str | None = None
    """The pack that it is for: a signature does not cover the address, so a sender may say it here as well."""


class CloudEvent(BaseModel):
    """A CloudEvent 1.0 in JSON, whose data is a message of ours."""

    model_config = ConfigDict(extra="allow", strict=True)

    specversion: Literal["1.0"]
    id: Annotated[str, Field(min_length=1, max_length=500)]
    source: Annotated[str, Field(min_length=1, max_length=500)]
    type: Annotated[str, Field(min_length=1)]
    datacontenttype: Annotated[str, AfterValidator(_json_type)] | None = None
    data: Any


class Notified(BaseModel):
    """One alert of a notification."""

    model_config = ConfigDict(extra="ignore", strict=True)

    status: Literal["firing", "resolved"]
    labels: dict[str, str]
    annotations: dict[str, str] = {}
    startsAt: Annotated[str, Field(min_length=1, max_length=64)]  # noqa: N815  Alertmanager's names
    generatorURL: str = ""  # noqa: N815
    fingerprint: Annotated[str, Field(min_length=1, max_length=200)]
    values: dict[str, Any] | None = None

    @property
    def reason(self) -> str:
        """The alert's name and what it says of itself."""
        name = self.labels.get("alertname", "")
        said = next((text for key in ("summary", "description", "message") if (text := self.annotations.get(key))), "")
        line = " ".join(f"{name}: {said}".split()).strip(" :") or f"alert {self.fingerprint}"
        return line if len(line) <= REASON else f"{line[: REASON - 1]}…"


class Notification(BaseModel):
    """What Alertmanager's webhook (version 4) and Grafana's (version 1) post: a group of alerts."""

    model_config = ConfigDict(extra="ignore", strict=True)

    version: Literal["4", "1"]
    alerts: Annotated[list[Any], Field(min_length=1)]


def read(sender: str, pack: str, headers: Mapping[str, str], body: bytes, now: datetime) -> Messages:
    """Read a body that `sender` posted for `pack`. Raises MessageError, ContentTypeError, TooLargeError.

    The sender's id of a message is its `webhook-id`, else its `idempotency-key`, else its CloudEvent's source and id,
    else the body's hash. In a notification each alert has its own: the fingerprint, when it began, and its status.
    """
    kind, value = _content_type(headers.get("content-type", "")), _parsed(body)
    event_id = _binary_event(headers) if kind == JSON else None
    if kind == JSON and event_id is None and isinstance(value, dict) and "alerts" in value:
        return _notification(sender, _as(Notification, value))
    if len(body) > BODY_BYTES:
        raise TooLargeError
    data = _cleaned(value)
    if kind == CLOUDEVENT:
        event = _as(CloudEvent, data)
        data, event_id = event.data, f"{event.source} {event.id}"
    message = _as(Message, data, "data." if kind == CLOUDEVENT else "")
    if message.pack not in (None, pack):
        raise MessageError(f"pack: {quoted(message.pack)} is not the pack it was posted for, {quoted(pack)}")
    sender_id = _said_id(headers) or event_id or hashlib.sha256(body).hexdigest()
    alert = NewAlert(
        sender=sender,
        sender_id=sender_id,
        reason=message.reason,
        fingerprint=message.fingerprint or hashlib.sha256(message.reason.encode()).hexdigest()[:16],
        as_of=None if message.as_of is None else _instant(message.as_of, now),
        evidence=message.evidence,
    )
    return Messages([alert], {})


def _notification(sender: str, notification: Notification) -> Messages:
    """The alerts of a notification that can be kept; raises MessageError where none can."""
    alerts, refused = [], {}
    for index, value in enumerate(notification.alerts[:AT_ONCE]):
        try:
            alerts.append(_notified(sender, _as(Notified, _cleaned(value, "alert."), "alert.")))
        except MessageError as error:
            refused[index] = str(error)
    if not alerts:
        index, why = next(iter(refused.items()))
        raise MessageError(numbered(index, why))
    if (more := len(notification.alerts) - AT_ONCE) > 0:
        refused[AT_ONCE] = f"alert: this one and all after it, {more:,}, are past the first {AT_ONCE:,}"
    return Messages(alerts, refused)


def numbered(index: int, why: str) -> str:
    """Say in a refusal which alert of the notification it is."""
    return f"alerts.{index}{why.removeprefix('alert')}"


def _notified(sender: str, alert: Notified) -> NewAlert:
    evidence: dict[str, Any] = alert.model_dump(include={"labels", "annotations", "startsAt", "generatorURL", "values"})
    return NewAlert(
        sender=sender,
        sender_id=f"{alert.fingerprint} {alert.startsAt} {alert.status}",
        reason=alert.reason,
        fingerprint=alert.fingerprint,
        evidence={key: value for key, value in evidence.items() if value},
        status=alert.status,
        ended_by=f"{alert.fingerprint} {alert.startsAt} resolved" if alert.status == "firing" else None,
    )


def _said_id(headers: Mapping[str, str]) -> str | None:
    """The id that the sender gave the message in a header."""
    for name in ("webhook-id", "idempotency-key"):
        if said := headers.get(name):
            if len(said) > ID:
                raise MessageError(f"{name}: is longer than {ID} characters")
            return said
    return None


def _content_type(header: str) -> str:
    kind, *parameters = (part.strip().lower() for part in header.split(";"))
    charset = next((part.split("=", 1)[-1].strip('" ') for part in parameters if part.startswith("charset=")), "utf-8")
    if kind not in (JSON, CLOUDEVENT) or charset not in ("utf-8", "us-ascii"):
        raise ContentTypeError(f"{header[:80]!r} is not read: send {JSON} or {CLOUDEVENT}, in UTF-8")
    return kind


def _binary_event(headers: Mapping[str, str]) -> str | None:
    """Source and id of a CloudEvent whose attributes are headers; None where the message is none."""
    if "ce-specversion" not in headers:
        return None
    attributes = {name: headers[f"ce-{name}"] for name in CloudEvent.model_fields if f"ce-{name}" in headers}
    event = _as(CloudEvent, {**attributes, "data": None}, "ce-")
    return f"{event.source} {event.id}"


def _parsed(body: bytes) -> Any:
    if body.count(b"{") + body.count(b"[") > BODY_BYTES:  # each costs a hundred times its size
        raise MessageError(f"body: holds more than {BODY_BYTES:,} objects and lists")
    try:
        return from_json(body, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        raise MessageError(f"body: is not JSON: {error}") from None


def _cleaned(value: Any, prefix: str = "") -> Any:
    """A JSON value of one alert with control characters in its texts escaped, in linear time.

    Raises MessageError for a value larger than BODY_BYTES, and for a number that is past all bounds, which JSON can say
    and an event cannot.
    """
    top, size = [value], 0
    left: list[tuple[Any, _Where]] = [(top, None)]
    while left:
        part, where = left.pop()
        texts = (*part, *part.values()) if isinstance(part, dict) else part
        size += len(part) + sum(len(text) for text in texts if isinstance(text, str))
        if size > BODY_BYTES:
            raise MessageError(f"{prefix.rstrip('.') or 'body'}: is larger than {BODY_BYTES // 1024} KiB")
        if isinstance(part, dict):
            for key in [key for key in part if visible(key) != key]:
                part[visible(key)] = part.pop(key)
        places = list(part.items()) if isinstance(part, dict) else enumerate(part)
        for place, child in places:
            if isinstance(child, str):
                if (text := visible(child)) != child:
                    part[place] = text
            elif isinstance(child, dict | list):
                left.append((child, None if part is top else (where, place)))
            elif isinstance(child, float) and not math.isfinite(child):
                raise MessageError(f"{_place(_path((where, place)), prefix)}: the number is too large")
    return top[0]


def _path(where: _Where) -> tuple[str | int, ...]:
    parts: list[str | int] = []
    while where is not None:
        where, part = where
        parts.append(part)
    return tuple(reversed(parts))


def _place(where: tuple[str | int, ...], prefix: str = "") -> str:
    """A place in a body, fit for a log."""
    names = [str(part) if str(part).isidentifier() or str(part).isdecimal() else ascii(part) for part in where[:8]]
    return (prefix + ".".join(name[:60] for name in names)) or "body"


def _as(model: type[Model], value: Any, prefix: str = "") -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        what = SAID.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        place = _place(first["loc"], prefix) if first["loc"] else prefix.rstrip(".-") or "body"
        raise MessageError(f"{place}: {what[0].lower()}{what[1:]}") from None


SAID = {
    "missing": "is missing",
    "extra_forbidden": "unknown field",
    "model_type": "is no JSON object",
    "dict_type": "is no JSON object",
    "string_type": "is no text",
    "list_type": "is no list",
}
"""Mistakes in our words, by pydantic's names for them."""


def _instant(value: str, now: datetime) -> datetime:
    try:
        instant = parse_instant(value)
    except (ValueError, OverflowError):
        raise MessageError(
            f"as_of: {quoted(value)} is not a time: write 2013-04-01 or 2013-04-01T06:00:00+00:00"
        ) from None
    if instant > now + TOLERANCE:
        # Time only moves forward: a champion from the future would never be replaced.
        raise MessageError(f"as_of: {quoted(value)} is in the future")
    return instant
