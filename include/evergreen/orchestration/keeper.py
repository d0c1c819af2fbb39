"""Keeps a process of the embedded home running: `python -m evergreen.orchestration.keeper COMMAND…`.

An error that Airflow's scheduler did not foresee ends it, and nobody on one machine would start it again: there is no
orchestrator as elsewhere. One keeper waits beside each process, so it imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

LONGEST_PAUSE_S = 60.0
READY_WITHIN_S = 600.0
"""What has not ended is still on its way there, on a machine however slow.

Whoever brought it up has given up by then, or was stopped before it could say how it went.
"""


class Keeper:
    """One command, run again whenever it ends."""

    def __init__(self, command: list[str], *, pause_s: float = 1.0, well_after_s: float = 20.0) -> None:
        self.command = command
        self.pause_s = pause_s
        self.well_after_s = well_after_s
        self.ready = False

    def keep(self) -> int:
        """Run the command until SIGTERM comes; → its last exit code.

        Until SIGUSR1 says that it got ready, its end is final: what cannot start is its user's to mend. After that, or
        after `READY_WITHIN_S`, it is started again, after a pause that doubles from `pause_s` up to a minute while no life
        lasts `well_after_s`.
        """
        signal.signal(signal.SIGUSR1, self._get_ready)
        signal.signal(signal.SIGTERM, _tell)
        pause, process = 0.0, None
        try:
            while True:
                began = time.monotonic()
                process = self._start()
                code = process.wait() if process else 1
                lived = time.monotonic() - began
                if process:
                    _sweep(process.pid)
                if not self.ready and lived < READY_WITHIN_S:
                    self._say(f"ended with {code} before it was ready")
                    return code
                self.ready = True
                pause = min(2 * pause, LONGEST_PAUSE_S) if pause and lived < self.well_after_s else self.pause_s
                self._say(f"ended with {code} after {lived:.0f} s; started again in {pause:g} s")
                time.sleep(pause)
        except _Told:
            if process is None:
                return 0
            process.terminate()
            return process.wait()

    def _start(self) -> subprocess.Popen[bytes] | None:
        """The process, in a group of its own; None where the machine has no room for one more."""
        with contextlib.suppress(OSError):
            return subprocess.Popen(self.command, process_group=0)
        return None

    def _say(self, what: str) -> None:
        """To the log, which may lie on a disk that is full."""
        with contextlib.suppress(OSError):
            print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {what}: {self.command}", flush=True)  # noqa: T201

    def _get_ready(self, _signal: int, _frame: object) -> None:
        self.ready = True


class _Told(BaseException):
    """SIGTERM came."""


def _tell(_signal: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise _Told


def _sweep(group: int) -> None:
    """End what a dead process has left in its group: its workers wait for it for ever, its server keeps the port."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(Keeper(sys.argv[1:]).keep())
