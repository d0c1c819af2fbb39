"""The web app on Airflow's API server: the webhook, and whatever else is asked for with Airflow's own authentication."""

from __future__ import annotations

from airflow.api_fastapi.core_api.security import get_user
from fastapi import Depends, FastAPI, HTTPException, Response

from evergreen.errors import EvergreenError, PackError, RegistryError
from evergreen.keys import WATCH
from evergreen.settings import Settings
from evergreen.triggers.webhook import UNAUTHENTICATED, make_app


def web_app() -> FastAPI:
    """The app to mount. What a plugin mounts, Airflow leaves open to everybody: each route says who may use it."""
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
