"""Protection of the whole API server from web pages of other sites that the same browser shows.

- DNS rebinding: a site's name may be made to lead to this server. A request by a name that is not the server's own is
  refused. An address such as 10.0.0.7 needs no check, since no other site can have it.
- Cross-site requests: a page may post without reading the answer. Whatever may change something is refused when the
  browser says that another site sent it. Programs that are no browsers send neither `Origin` nor `Sec-Fetch-Site`.
- Clickjacking: no page may be shown in a frame.

Not here: who may do what; that is Airflow's authentication and, for the webhook, the senders' secrets.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SAFE = frozenset(["GET", "HEAD", "OPTIONS"])
"""Methods that change nothing."""
OWN_SITE = frozenset(["same-origin", "none"])
"""Values of `Sec-Fetch-Site` for requests of the server's own pages and of a person's address bar."""
FRAMES = [(b"content-security-policy", b"frame-ancestors 'none'"), (b"x-frame-options", b"DENY")]


def own_names(urls: Iterable[str | None], more: str = "") -> frozenset[str]:
    """Return the host names under which the server may be asked: `localhost`, those of `urls`, and `more`, with commas."""
    hosts = (urlsplit(url).hostname for url in urls if url)
    return frozenset(["localhost", *filter(None, hosts), *(name.strip().lower() for name in more.split(",") if name)])


class Guard:
    """ASGI middleware that refuses what another site's page may send, with 403 and a sentence."""

    def __init__(self, app: App, names: frozenset[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or hand it on with headers that forbid frames added to its answer."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = refused(self._names, str(scope.get("method", "WEBSOCKET")), headers)
        if refusal is None:
            await self._app(scope, receive, _unframed(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[:120]})
        else:
            body = refusal.encode()
            plain = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": plain + FRAMES})
            await send({"type": "http.response.body", "body": body})


def refused(names: frozenset[str], method: str, headers: Mapping[str, str]) -> str | None:
    """Return why a request is refused, or None. `headers` have lower-case names."""
    host = headers.get("host", "")
    name = _name(host)
    if name not in names and not _is_address(name):
        shown = host[:80].encode("ascii", "backslashreplace").decode()
        return f"{shown!r} is not a name of this server. Its operator can add it to EVERGREEN_HOSTS.\n"
    if method in SAFE:
        return None
    site = headers.get("sec-fetch-site")
    origin = headers.get("origin")
    if (site is not None and site not in OWN_SITE) or (origin is not None and urlsplit(origin).netloc != host):
        return "A page of another site sent this request. Open this server's own pages instead.\n"
    return None


def _name(host: str) -> str:
    """The host name of a `Host` header, without its port; empty where it cannot be read."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _unframed(send: Send) -> Send:
    """`send` that adds the headers against frames to an answer that has none of its own."""

    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {bytes(name).lower() for name, _ in message.get("headers", ())}
            added = [header for header in FRAMES if header[0] not in present]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return guarded
