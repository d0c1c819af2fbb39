"""The embedded home: started, stopped, and Airflow's own command line on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

from evergreen.cli.terminal import AsJson, out, show_json
from evergreen.settings import Settings


def up(as_json: AsJson = False) -> None:
    """Start Airflow (UI, scheduler, triggerer) and the MLflow UI on this home, on loopback only."""
    from evergreen.orchestration import embedded

    settings = Settings.from_env()
    addresses = {}
    for name, address in embedded.up(settings, lambda text: typer.echo(text, err=True)):
        addresses[name] = address
        if not as_json:
            out().print(f"[bold]{name:<8}[/] {address}")
    if as_json:
        show_json(addresses)
    else:
        out().print(f"logs: {settings.home / 'logs'} · stop: make down")


def down(as_json: AsJson = False) -> None:
    """Stop what `up` started."""
    from evergreen.orchestration import embedded

    stopped = embedded.down(Settings.from_env())
    if as_json:
        show_json({"stopped": stopped})
    else:
        out().print(f"stopped: {', '.join(stopped) if stopped else 'nothing was running'}")


def airflow(context: typer.Context) -> None:
    """Airflow's own command line on this home: `evergreen airflow backfill create --help`."""
    from evergreen.orchestration import embedded

    settings = Settings.from_env()
    embedded.prepare(settings)
    env = {**os.environ, **embedded.environment(settings)}
    code = subprocess.run(
        [str(Path(sys.executable).parent / "airflow"), *context.args], env=env, check=False
    ).returncode
    raise typer.Exit(code)
