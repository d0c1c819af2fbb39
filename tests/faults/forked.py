"""Starts jobs by forking a process that has imported what they need, so that a test of many small jobs takes less time.

A job is a process with a session, a folder and a log of its own all the same, and does what `evergreen.runner` does. Run
as a script, this file is the process that forks: it reads one request a line from its socket, and answers with a pid.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from evergreen.training.runtimes import process


@contextmanager
def forked_jobs() -> Iterator[None]:
    """Within this, jobs on this machine are forked."""
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.MonkeyPatch.context() as patch:
        command = [sys.executable, __file__, str(theirs.fileno())]
        server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=process.environment(os.environ))

        def popen(command: list[str], *, stdout: Any, pass_fds: tuple[int], **_: Any) -> SimpleNamespace:
            socket.send_fds(ours, [json.dumps(command[-1]).encode()], [stdout.fileno(), *pass_fds])
            return SimpleNamespace(pid=int(ours.recv(100)), returncode=None)

        fake = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
        patch.setattr(process, "subprocess", fake)
        try:
            yield
        finally:
            server.kill()
            server.wait()


def serve(number: int) -> None:
    """Fork a job for each request, until nobody asks any more."""
    import numpy as np  # noqa: F401  what jobs import
    import pandas as pd  # noqa: F401
    import polars as pl  # noqa: F401
    import pyarrow.parquet as pq  # noqa: F401

    from evergreen import runner

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever waits for a job waits by its pidfd
    asked = socket.socket(fileno=number)
    while True:
        request, descriptors, _, _ = socket.recv_fds(asked, 10_000, 2)
        if not request:
            return
        pid = os.fork()
        if pid:
            for descriptor in descriptors:
                os.close(descriptor)
            asked.send(str(pid).encode())
            continue
        asked.close()
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptors[0], 1)
        os.dup2(descriptors[0], 2)
        sys.argv = ["runner", json.loads(request)]
        runner.main()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
