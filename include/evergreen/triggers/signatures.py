"""Standard Webhooks (version 1, symmetric): a message signed with a secret that both sides know; and posting one.

`signature = base64(hmac_sha256(secret, id + "." + timestamp + "." + body))`, over the bytes as they are sent.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import quote

from evergreen.errors import AlertError

PREFIX = "whsec_"
"""A signing secret begins with this; what follows is its key in base64."""

KEY_BYTES = range(24, 65)
"""How long a key may be: what the standard asks for."""

TOLERANCE = timedelta(seconds=300)
"""How far a message's timestamp may be from now, either way."""

ID = re.compile(r"[!-\-/-~]{1,200}")
"""An id of a message: visible ASCII. No full stop: the signed text could be cut elsewhere, and say something else."""

TIMESTAMP = re.compile(r"[0-9]{1,11}")


class SignatureError(Exception):
    """A message is not what a holder of the secret signed just now; says why."""


def key_of(secret: str) -> bytes:
    """The key in a signing secret. Raises ValueError, which does not show the secret."""
    if not secret.startswith(PREFIX):
        raise ValueError(f"is not a signing secret: it begins with {PREFIX}")
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"is not a signing secret: what follows {PREFIX} is not base64") from None
    if len(key) not in KEY_BYTES:
        raise ValueError(f"is a signing secret of {len(key)} bytes: it has {KEY_BYTES[0]} to {KEY_BYTES[-1]}")
    return key


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:  # noqa: A002  the standard's word
    """The `webhook-signature` of a message; `timestamp` in seconds since 1970."""
    return _signature(key_of(secret), id, str(timestamp), body)


def verify(keys: Iterable[bytes], headers: Mapping[str, str], body: bytes, now: float) -> bytes:
    """The one of `keys` that `body` was signed with, within the tolerance around `now`; else raises SignatureError.

    `headers` are `webhook-id`, `webhook-timestamp` and `webhook-signature`, by their names in lower case.
    """
    id, timestamp, signatures = (headers.get(f"webhook-{name}", "") for name in ("id", "timestamp", "signature"))  # noqa: A001
    if not (id and timestamp and signatures):
        raise SignatureError("webhook-id, webhook-timestamp or webhook-signature is missing")
    if not ID.fullmatch(id):
        raise SignatureError("webhook-id is not 1 to 200 visible ASCII characters without a full stop")
    if not TIMESTAMP.fullmatch(timestamp):
        raise SignatureError("webhook-timestamp is not a number of seconds")
    if abs(now - int(timestamp)) > TOLERANCE.total_seconds():
        raise SignatureError(f"webhook-timestamp is more than {TOLERANCE.total_seconds():.0f} s from now")
    given = [signature.encode() for signature in signatures.split(" ")]
    found = None
    for key in keys:
        expected = _signature(key, id, timestamp, body).encode()
        for signature in given:  # every one is compared, whatever matched: the time tells nothing
            if hmac.compare_digest(expected, signature):
                found = key
    if found is None:
        raise SignatureError("no signature is that of an active secret")
    return found


def post(url: str, pack: str, secret: str, message: Mapping[str, Any], *, id: str | None = None) -> dict[str, Any]:  # noqa: A002
    """Post an alert of `pack`, signed, to the Evergreen at `url`; → its answer, `{alert, alerts}`.

    The same `id` again is the same alert, so a post whose answer was lost may be repeated. Raises AlertError.
    """
    import httpx

    id = id or f"msg_{uuid.uuid4().hex}"  # noqa: A001
    if not ID.fullmatch(id):
        raise AlertError(
            f"{id!r} cannot be an alert's id", fix="use 1 to 200 visible ASCII characters but the full stop"
        )
    body = json.dumps({"pack": pack, **message}, allow_nan=False).encode()  # the signature does not cover the address
    timestamp = int(time.time())
    headers = {
        "content-type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(secret, id, timestamp, body),
    }
    address = f"{url.rstrip('/')}/evergreen/alerts/{quote(pack, safe='')}"
    try:
        # No proxy: Evergreen's address is one of this machine's or this network's. A CA of one's own: SSL_CERT_FILE.
        tls = httpx.create_ssl_context()
        answer = httpx.post(address, content=body, headers=headers, verify=tls, timeout=60, trust_env=False)
        told = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise AlertError(f"{address}: nobody answers: {error}", fix="start it: make up") from error
    except ValueError:
        told = {}
    if answer.status_code != 202:
        why = told.get("detail", answer.reason_phrase) if isinstance(told, dict) else answer.reason_phrase
        raise AlertError(
            f"{address}: {answer.status_code}: {why}", fix=FIXES.get(answer.status_code, "try again later")
        )
    return dict(told)


FIXES = {
    401: "sign with an active secret of the senders file that the server reads, on a clock that is right",
    404: "name a pack that `evergreen packs` shows",
    413: "send less evidence",
    422: "mend what the answer names",
}
"""What to do about a refusal, by its status."""


def _signature(key: bytes, id: str, timestamp: str, body: bytes) -> str:  # noqa: A002
    signed = b".".join((id.encode(), timestamp.encode(), body))
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
