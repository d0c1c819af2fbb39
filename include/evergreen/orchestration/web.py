"""The web app on Airflow's API server: the webhook, and whatever else is asked for with Airflow's own authentication."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from typing import Any

from airflow.api_fastapi.core_api.security import get_user
from airflow.sdk.configuration import conf
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from evergreen.errors import EvergreenError, PackError, RegistryError, StageError
from evergreen.keys import WATCH
from evergreen.orchestration.guard import Guard, own_names
from evergreen.settings import Settings
from evergreen.triggers.webhook import UNAUTHENTICATED, make_app

HOSTS = "EVERGREEN_HOSTS"
"""Further host names of this server, with commas between them: those that a proxy in front of it is asked by."""
URL = "EVERGREEN_URL"


def web_app() -> FastAPI:
    """The app to mount. What a plugin mounts, Airflow leaves open to everybody: each route says who may use it."""
    if conf.get("database", "sql_alchemy_conn").startswith("sqlite"):
        _log_actions_beside_the_loop()
    settings = Settings.from_env()
    app = make_app(settings, get_user)

    @app.get(
        "/drift/{pack}/{run}", dependencies=[Depends(get_user)], response_class=Response, responses=UNAUTHENTICATED
    )
    def drift(pack: str, run: str) -> Response:
        """The page that a run of the monitor wrote."""
        from evergreen.loop.monitor import page_of

        try:
            page = page_of(settings, pack, f"{WATCH}{run}")
        except StageError as error:
            raise HTTPException(410, error.what) from error
        except EvergreenError as error:
            raise HTTPException(503, error.what) from error
        if page is None:
            raise HTTPException(404, "this run compared nothing: the log of its task monitor says why")
        return Response(page, media_type="text/html; charset=utf-8")

    @app.get(
        "/report/{pack}/{version}", dependencies=[Depends(get_user)], response_class=Response, responses=UNAUTHENTICATED
    )
    def report(pack: str, version: int) -> Response:
        """The report on a version, with its plots."""
        from evergreen.loop.approval import page_of

        try:
            page = page_of(settings, pack, version)
        except (PackError, RegistryError) as error:
            raise HTTPException(404, error.what) from error
        except EvergreenError as error:
            raise HTTPException(503, error.what) from error
        return Response(page, media_type="text/html; charset=utf-8")

    return app


def guard() -> dict[str, Any]:
    """Return the middleware for Airflow to add, with the names that its settings give this server."""
    urls = [conf.get("api", "base_url"), conf.get("core", "execution_api_server_url", fallback=""), os.environ.get(URL)]
    names = own_names(urls, os.environ.get(HOSTS, ""))
    return {"name": "evergreen.guard", "middleware": Guard, "args": [], "kwargs": {"names": names}}


def _log_actions_beside_the_loop() -> None:
    """Let Airflow's API server write what people do into its log from a thread.

    Airflow 3.3 commits it on the event loop, and waits there for SQLite's one writer. That is often another request of
    the same server, a task that begins, whose own commit needs the loop: both wait until SQLite gives up, and with them
    whatever the server is asked. Airflow's routes are made after its plugins, and take the function as it is then.
    """
    from airflow.api_fastapi.logging import decorators

    made = decorators.action_logging

    def action_logging(*arguments: Any, **named: Any) -> Any:
        log_action = made(*arguments, **named)

        @functools.wraps(log_action)
        async def beside(request: Request, session: Any, user: Any) -> None:
            await request.body()  # the request keeps it: in the thread nothing of this loop is waited for
            await run_in_threadpool(lambda: asyncio.run(log_action(request, session, user)))

        vars(beside)["__signature__"] = inspect.signature(log_action, eval_str=True)
        return beside

    decorators.action_logging = action_logging
