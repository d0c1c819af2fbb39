"""Registers Evergreen's web app with Airflow, under /evergreen, and the guard of the whole API server."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from airflow.plugins_manager import AirflowPlugin


class EvergreenPlugin(AirflowPlugin):
    """Every process of Airflow loads this; only the API server asks for the app, and only then is it imported."""

    name = "evergreen"

    @cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:
        """The app, and where it is mounted."""
        from evergreen.orchestration.web import web_app

        return [{"name": "evergreen", "url_prefix": "/evergreen", "app": web_app()}]

    @cached_property
    def fastapi_root_middlewares(self) -> list[dict[str, Any]]:
        """The guard against pages of other sites, for Airflow's own routes, too."""
        from evergreen.orchestration.web import guard

        return [guard()]
