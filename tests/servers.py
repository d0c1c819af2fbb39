"""Real servers for tests and benchmarks: on loopback, in temporary folders, started and stopped by whoever asks."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psycopg

WAIT_S = 60


class MissingError(Exception):
    """What the server needs and the machine lacks."""


def free_port() -> int:
    """A port of loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postgres:
    """A PostgreSQL server of its own, with as many databases as are asked for. Raises MissingError where it cannot run.

    Unless it is `durable` it leaves the writing to the operating system: its own death loses nothing, a power cut may.
    """

    def __init__(self, *, durable: bool = False) -> None:
        self._durable = durable
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda file: int(file.parts[4]))
        if not found:
            raise MissingError("PostgreSQL's server is not installed: apt-get install postgresql")
        self._bin = found[-1].parent
        # PostgreSQL refuses to run as root.
        self._user: dict[str, str] = {}
        if os.geteuid() == 0:
            try:
                pwd.getpwnam("postgres")
            except KeyError:
                raise MissingError("PostgreSQL does not run as root, and there is no user postgres") from None
            self._user = {"user": "postgres", "group": "postgres"}
        self._folder = Path(tempfile.mkdtemp(prefix="evergreen-postgres-"))
        if self._user:
            shutil.chown(self._folder, "postgres", "postgres")
        self.port = free_port()
        self._server: subprocess.Popen[bytes] | None = None
        self._made = 0
        self._call("initdb", "-D", self._folder / "data", "-U", "evergreen", "-A", "trust", "-E", "UTF8", "--no-sync")

    def start(self) -> None:
        """Start it, and return when it answers. After a kill it first repairs what that left."""
        data, log = self._folder / "data", self._folder / "log"
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if self._server is None or self._server.poll() is not None:
                # The children of one that was killed may live for a moment, and a new one refuses to start until then.
                settings = {
                    "listen_addresses": "127.0.0.1",
                    "unix_socket_directories": self._folder,
                    "port": self.port,
                    "fsync": "on" if self._durable else "off",
                }
                with log.open("ab") as output:
                    self._server = subprocess.Popen(
                        [
                            self._bin / "postgres",
                            "-D",
                            data,
                            *(f"--{name}={value}" for name, value in settings.items()),
                        ],
                        stdout=output,
                        stderr=output,
                        **self._user,
                    )
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self._address("postgres")):
                return
            time.sleep(0.05)
        raise TimeoutError(f"PostgreSQL did not answer:\n{log.read_text()[-2000:]}")

    def kill(self) -> None:
        """Kill it with SIGKILL: open connections break, and what was not committed is gone."""
        assert self._server is not None, "it was started"
        self._server.send_signal(signal.SIGKILL)
        self._server.wait()

    def stop(self) -> None:
        """Stop it for good and remove its folder."""
        if self._server is not None and self._server.poll() is None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(WAIT_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def database(self) -> str:
        """The URL of a new, empty database."""
        self._made += 1
        name = f"events_{self._made}"
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://evergreen@127.0.0.1:{self.port}/{name}"

    def _address(self, name: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=evergreen dbname={name} connect_timeout=5"

    def _call(self, tool: str, *arguments: object) -> None:
        command = [self._bin / tool, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **self._user)
        if done.returncode:
            raise RuntimeError(f"{tool} failed:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")


class S3:
    """An S3 service in this process: moto's, whose buckets are in memory."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.ills = 0
        """So many requests to come are answered 503."""
        self.asked: list[tuple[str, str]] = []
        """Method and path of each request."""
        self.ranges = 0
        """How many bytes were asked for as parts of objects."""
        self._made = 0

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.asked.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        if environ["REQUEST_METHOD"] == "GET" and (part := environ.get("HTTP_RANGE")):
            first, last = part.removeprefix("bytes=").split("-")
            self.ranges += int(last) - int(first) + 1
        if self.ills:
            self.ills -= 1
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        return self._moto(environ, start_response)  # type: ignore[no-any-return]

    def environment(self) -> dict[str, str]:
        """What its clients need of the environment."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "evergreen",
            "AWS_SECRET_ACCESS_KEY": "not so secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self) -> str:
        """The name of a new bucket."""
        self._made += 1
        self.client().create_bucket(Bucket=f"evergreen-{self._made}")
        return f"evergreen-{self._made}"

    def client(self) -> Any:
        """A stock client."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="evergreen",
            aws_secret_access_key="not so secret",
            region_name="us-east-1",
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody's key is known."""
        import httpx

        httpx.post(f"{self.url}/moto-api/reset-auth", content="0")
        try:
            yield
        finally:
            httpx.post(f"{self.url}/moto-api/reset-auth", content="inf")

    def stop(self) -> None:
        """Stop it for good."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
