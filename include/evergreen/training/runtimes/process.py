"""A job as a process of this machine, in a session of its own. Linux only: it reads /proc and waits on pidfds.

Two files of the job's folder say which process it is:

    pid.json    {pid, started, at}. `started` is the boot and the clock tick at which the kernel made the process, so a
                pid that was given to another process since is not taken for the job.
    lock        held (flock) by the process and all it forks, from before it exists until the last one ends. A caller
                killed between starting the process and writing `pid.json` leaves a held lock; the runner then writes
                `pid.json` itself, and no second process is started.

The number of a process is not given anew while its session has members: where nobody has the job's pid, whoever is in
that session is the job's.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from evergreen.errors import JobError
from evergreen.training.checkpoints import write_whole

KEPT = ("PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "XDG_CACHE_HOME")
PREFIXES = (
    "LD_",
    "LC_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "OMP_",
    "KMP_",
    "MKL_",
    "OPENBLAS_",
    "TORCH",
    "PYTORCH_",
    "TRITON_",
)
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


def launch(folder: Path) -> None:
    """Start `evergreen.runner` on the folder. Raises JobError when a process that is not known holds the folder."""
    with (folder / "lock").open("a") as lock, (folder / "log.txt").open("ab") as log:
        if not _until(lambda: _lock(lock), timeout_s=0.2):
            raise JobError(
                f"{folder / 'lock'} is held by a process that pid.json does not name",
                fix=f"find it with `fuser {folder / 'lock'}` and end it, then run again",
            )
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "evergreen.runner", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(os.environ),
            pass_fds=(lock.fileno(),),
            start_new_session=True,
        )
        record(folder, child.pid)
    child.returncode = 0  # it may outlive this object, which would warn of it otherwise


def alive(folder: Path) -> bool:
    """Whether the job runs, whoever started it."""
    # A held lock without a known process: it is about to write pid.json, or only children of a killed job are left.
    _until(lambda: _pid(folder) is not None or not _is_locked(folder), timeout_s=2.0)
    return _pid(folder) is not None


def age_s(folder: Path) -> float:
    """Seconds since the last launch; 0 before the first."""
    known = _known(folder)
    return time.time() - known["at"] if known else 0.0


def join(folder: Path, timeout_s: float) -> bool:
    """Wait for the end of the job's process, at most so long; whether it has ended."""
    pid = _pid(folder)
    if pid is None:
        return True
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        ended = _pid(folder) != pid or bool(waiting.poll(timeout_s * 1000))
    finally:
        os.close(handle)
    if ended:
        with suppress(ChildProcessError):  # it is another's child
            os.waitpid(pid, os.WNOHANG)
    return ended


def stop(folder: Path, grace_s: float = 5.0) -> None:
    """End all processes of the job's session: SIGTERM, then SIGKILL after the grace."""
    for sign, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        for pid in _session(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        if _until(lambda: not _session(folder), timeout_s=patience_s):
            break
    join(folder, timeout_s=0.0)


def record(folder: Path, pid: int) -> None:
    """Write `pid.json`, unless it says so already: the job in this folder is the process `pid`."""
    found = _stat(pid)
    if found is not None and _pid(folder) != pid:
        content = {"pid": pid, "started": found[0], "at": time.time()}
        write_whole(folder / "pid.json", json.dumps(content).encode())


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a job is given of the environment: what Python and CUDA need, no settings of Airflow or ours, no secrets."""
    kept = {
        name: value
        for name, value in environ.items()
        if (name in KEPT or name.startswith(PREFIXES)) and not any(word in name for word in SECRET_WORDS)
    }
    # Sets of strings in one order; the same cuBLAS results each time; a log that is whole when the job is killed.
    return kept | {"PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}


def _known(folder: Path) -> dict[str, Any] | None:
    try:
        known = json.loads((folder / "pid.json").read_bytes())
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and {"pid", "started", "at"} <= known.keys() else None


def _pid(folder: Path) -> int | None:
    """The job's process, if it lives."""
    known = _known(folder)
    if known is None:
        return None
    found = _stat(known["pid"])
    return known["pid"] if found is not None and found[0] == known["started"] and found[1] else None


def _session(folder: Path) -> list[int]:
    """All living processes of the job's session, its own first."""
    known = _known(folder)
    if known is None:
        return []
    first = _stat(known["pid"])
    if first is not None and first[0] != known["started"]:
        return []  # the pid is another's now, so the session is gone
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        found = _stat(int(entry.name))
        if found is not None and found[2] == known["pid"] and found[1]:
            members.append(int(entry.name))
    return sorted(members, key=lambda pid: pid != known["pid"])


def _stat(pid: int) -> tuple[str, bool, int] | None:
    """(boot and tick at which it was made, whether it lives, session) of a process, by proc(5); None when there is none.

    A process whose first thread has ended is called a zombie while others end: they still hold its files, and its GPU.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces; the first field here is the third
    return f"{boot}/{fields[19]}", fields[0] not in "ZX" or int(fields[17]) > 1, int(fields[3])


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / "lock").open("a") as file:
            return not _lock(file)
    except FileNotFoundError:
        return False


def _until(condition: Callable[[], bool], *, timeout_s: float) -> bool:
    """Whether the condition holds, now or before the time is up."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
