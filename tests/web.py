"""A web server of a folder, on loopback, which takes files too, and can be as unwell as real ones are."""

from __future__ import annotations

import html
import io
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote, urlsplit


class Web(ThreadingHTTPServer):
    """Serves `folder`, a page of links for each folder in it; its attributes may be changed while it runs.

    `ills` gives what is wrong with paths: a status such as 500; `cut`, the connection ends halfway; `cut chunks`, the
    same where the length was not said; `still`, half comes and then nothing; or a list of statuses that come first.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.ills: dict[str, int | str | list[int]] = {}
        self.needs: dict[str, str] = {}
        """Headers that a request must have, or be answered 401."""
        self.ranges = True
        """Whether a part of a file is sent when asked for, not all of it."""
        self.listing = "text/html"
        self.sent = 0
        """Bytes of files."""
        self.asked: list[str] = []
        self.ending = threading.Event()

    def handle_error(self, *_: object) -> None:
        """A client that has gone is nobody's fault."""


class _Answer(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer of two writes takes 40 ms

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _may(self) -> bool:
        return all(self.headers.get(name) == value for name, value in self.server.needs.items())

    def do_PUT(self) -> None:
        """Keeps the file, whole or not at all, whether its length is said or it comes in chunks."""
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self._change(HTTPStatus.CREATED, body)

    def do_DELETE(self) -> None:
        """Removes the file."""
        self._change(HTTPStatus.NO_CONTENT, None)

    def _change(self, status: HTTPStatus, body: bytes | None) -> None:
        path = unquote(urlsplit(self.path).path)
        ill = self.server.ills.get(path)
        place = self.server.folder / path.lstrip("/")
        if not self._may():
            status = HTTPStatus.UNAUTHORIZED
        elif isinstance(ill, int):
            status = HTTPStatus(ill)
        elif body is None and not place.exists():
            status = HTTPStatus.NOT_FOUND
        elif body is None:
            place.unlink()
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            part = place.with_name(f"{place.name}.{threading.get_ident()}")
            part.write_bytes(body)
            part.replace(place)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self) -> None:
        self.server.asked.append(self.path)
        path = unquote(urlsplit(self.path).path)
        ill = self.server.ills.get(path)
        place = self.server.folder / path.lstrip("/")
        if isinstance(ill, list):
            ill = ill.pop() if ill else None
        if not self._may():
            self.send_error(HTTPStatus.UNAUTHORIZED)
        elif isinstance(ill, int):
            self.send_error(ill)
        elif place.is_dir():
            names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in sorted(place.iterdir())]
            page = "".join(f'<a href="{quote(name)}">{html.escape(name)}</a>\n' for name in names).encode()
            self._send(io.BytesIO(page), {"Content-Type": self.server.listing})
        elif place.is_file():
            with place.open("rb") as file:
                self._send(file, {"Last-Modified": str(place.stat().st_mtime_ns)}, ill)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, file: IO[bytes], headers: dict[str, str], ill: str | None = None) -> None:
        size = file.seek(0, os.SEEK_END)
        first, last = 0, size - 1
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.ranges else None
        if part:
            first, last = int(part[1]), min(int(part[2]), last)
            headers |= {"Content-Range": f"bytes {first}-{last}/{size}"}
        length = last + 1 - first
        self.send_response(HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK)
        headers |= {"Transfer-Encoding": "chunked"} if ill == "cut chunks" else {"Content-Length": str(length)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if ill is not None:
            length //= 2
            self.close_connection = True
        self.server.sent += length
        file.seek(first)
        if ill == "cut chunks":
            self.wfile.write(b"%x\r\n%s\r\n" % (length, file.read(length)))
            return
        while piece := file.read(min(length, 2**20)):
            self.wfile.write(piece)
            length -= len(piece)
        if ill == "still":
            self.server.ending.wait()


@contextmanager
def serving(folder: Path) -> Iterator[Web]:
    """A server of `folder` while the block runs."""
    server = Web(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        server.server_close()
        thread.join()
