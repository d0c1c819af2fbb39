"""What Prometheus sees, printed or served."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Annotated, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import typer

from evergreen.cli.terminal import AsJson, out, show_json
from evergreen.errors import SettingsError, quoted
from evergreen.settings import Settings

LEAST = 32
"""How many characters a token has at least."""


def _address(value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    try:
        host = str(ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]")))
        number = int(port)
    except ValueError:
        raise typer.BadParameter(f"{quoted(value)} is not HOST:PORT: write 127.0.0.1:9464") from None
    if not 0 <= number < 65536:
        raise typer.BadParameter(f"{quoted(value)}: there is no port {number}: write 127.0.0.1:9464")
    return host, number


def metrics(
    serve: Annotated[
        Any, typer.Option(parser=_address, metavar="HOST:PORT", help="Serve them there until stopped.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Serve them to whoever sends the token in this file; off loopback, a must.")
    ] = None,
    airflow: Annotated[
        bool, typer.Option("--airflow", help="Airflow's own state, too: processes, queues, databases, disk.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Metrics in Prometheus' text format: alerts, decisions, runs, verdicts, champions, training, drift, budget."""
    from prometheus_client import generate_latest

    from evergreen.triggers import metrics as counted

    settings = Settings.from_env()
    registry = counted.registry(settings)
    if airflow:
        from evergreen.orchestration import embedded

        with contextlib.redirect_stdout(sys.stderr):  # where Airflow makes its database, it says so
            if "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN" not in os.environ:
                embedded.prepare(settings)
            from evergreen.orchestration.platform import Platform

        registry.register(Platform(settings))
    if serve:
        token = _token(token_file) if token_file else None
        if token is None and not ipaddress.ip_address(serve[0]).is_loopback:
            raise typer.BadParameter(
                f"{serve[0]} is not on loopback, where alone they may be served to anybody: say --token-file, or let "
                "Prometheus ask Airflow's API server, GET /evergreen/metrics with a token"
            )
        generate_latest(registry)  # what is wrong is said now
        _serve(registry, *serve, token=token, as_json=as_json)
    elif as_json:
        samples = [sample for family in registry.collect() for sample in family.samples]
        show_json([{"name": each.name, "labels": each.labels, "value": each.value} for each in samples])
    else:
        sys.stdout.write(generate_latest(registry).decode())


def _token(file: Path) -> str:
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {error}", fix="write the token into it") from error
    if len(token) < LEAST:
        raise SettingsError(
            f"{file}: a token of {len(token)} characters can be guessed", fix=f"write {LEAST} random ones or more"
        )
    return token


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def _serve(registry: Any, host: str, port: int, *, token: str | None, as_json: bool) -> None:
    from prometheus_client import make_wsgi_app

    app: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)

    def guarded(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        said = environ.get("HTTP_AUTHORIZATION", "")
        if token is not None and not hmac.compare_digest(said.encode(), f"Bearer {token}".encode()):
            start("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
            return [b"send the token: Authorization: Bearer ...\n"]
        return app(environ, start)

    _Server.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server = make_server(host, port, guarded, _Server, _Quiet)
    except OSError as error:
        raise SettingsError(f"{host}:{port} cannot be had: {error.strerror}", fix="choose another port") from error
    address = f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
    if as_json:
        show_json({"address": address})
        sys.stdout.flush()  # whoever reads it waits for it
    else:
        out().print(f"{address} · stop: Ctrl-C")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
