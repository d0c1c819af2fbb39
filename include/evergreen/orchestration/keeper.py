"""Keeps a process of the embedded home running: `python -m evergreen.orchestration.keeper COMMAND…`.

An error that Airflow's scheduler did not foresee ends it, and nobody on one machine would start it again: there is no
orchestrator as elsewhere. One keeper waits beside each process, so it imports nothing but the standard library.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

LONGEST_PAUSE_S = 60.0


def keep(command: list[str], *, well_after_s: float = 20.0, pause_s: float = 1.0) -> int:
    """Run the command, and again whenever it ends, until this process is told to stop; → its last exit code.

    A first start that does not live for `well_after_s` is final: what cannot start is its user's to mend. Later ones are
    tried again after a pause, which doubles from `pause_s` up to a minute while none lives that long.
    """
    pause = 0.0
    process = None
    try:
        while True:
            began = time.monotonic()
            process = subprocess.Popen(command)
            code = process.wait()
            lived = time.monotonic() - began
            if lived >= well_after_s:
                pause = pause_s
            elif pause:
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                return code
            at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            print(f"{at} ended with {code} after {lived:.0f} s; started again in {pause:g} s: {command}", flush=True)  # noqa: T201
            time.sleep(pause)
    except _Told:
        if process is None:
            return 0
        process.terminate()
        return process.wait()


class _Told(BaseException):
    """SIGTERM came."""


def _tell(_signal: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise _Told


def main() -> int:
    signal.signal(signal.SIGTERM, _tell)
    return keep(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
