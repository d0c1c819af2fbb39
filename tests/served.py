"""The webhook's app served by uvicorn on loopback, as Airflow's API server serves it, in a home of its own."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import HTTPException
from tests.servers import free_port

from evergreen import database as db
from evergreen.database import Event
from evergreen.settings import Settings
from evergreen.triggers import senders
from evergreen.triggers.signatures import sign
from evergreen.triggers.webhook import make_app

PACK = "digits"


class Served:
    """A home with two senders, `evergreen` and `alertmanager`, and the server of its webhook."""

    def __init__(self, home: Path, **places: str) -> None:
        places = {f"EVERGREEN_{name}": value for name, value in places.items()}
        self.settings = Settings.from_env({"EVERGREEN_HOME": str(home), **places})
        self.secret = senders.add(self.settings.senders, "evergreen", "signing")
        self.token = senders.add(self.settings.senders, "alertmanager", "bearer")
        self.app = make_app(self.settings, nobody)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.statuses: list[int] = []
        """Of the answers so far."""
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    async def __call__(self, scope, receive, send) -> None:
        async def noted(message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                self.statuses.append(message["status"])

        await self.app(scope, receive, noted)

    @contextmanager
    def running(self) -> Iterator[Served]:
        """The server, in a thread of this process."""
        with serving(self, self.port), self.client:
            yield self

    def signed(self, body: bytes, *, at: int, id: str | None = None, secret: str | None = None) -> dict[str, str]:  # noqa: A002
        """The headers of a signed message."""
        id = id or f"msg_{uuid.uuid4().hex}"  # noqa: A001
        return {
            "content-type": "application/json",
            "webhook-id": id,
            "webhook-timestamp": str(at),
            "webhook-signature": sign(secret or self.secret, id, at, body),
        }

    def post(self, content: bytes | str, headers: dict[str, str] | None = None, pack: str = PACK) -> httpx.Response:
        """A post; by the sender with the token unless `headers` say otherwise."""
        token = {"content-type": "application/json", "authorization": f"Bearer {self.token}"}
        return self.client.post(f"/alerts/{pack}", content=content, headers=token if headers is None else headers)

    def kept(self) -> list[Event]:
        """The alerts in the inbox, in order."""
        return db.connect(self.settings.database_url).events(PACK, kind="alert")


@contextmanager
def serving(app: Any, port: int) -> Iterator[None]:
    """The ASGI app on loopback, in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "it started"
            time.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        thread.join()


def nobody() -> None:
    """Airflow's authentication, for which nobody here has a token."""
    raise HTTPException(401, "Not authenticated")
