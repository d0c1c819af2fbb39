"""The keeper of a process: again when it ends, not where it never got ready, and never after it was told to stop."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.e2e.test_scheduler import until

KEEP = "import sys; from evergreen.orchestration.keeper import Keeper; pause, well, *command = sys.argv[1:]; "
KEEP += "sys.exit(Keeper(command, pause_s=float(pause), well_after_s=float(well)).keep())"
READY = "import os, signal, sys, time; os.kill(os.getppid(), signal.SIGUSR1); "
"""What whoever brings it up says once it answers."""


@pytest.fixture
def keep():
    """Keeps a Python program."""
    started = []

    def start(code, *, pause_s=0.05, well_after_s=3600.0, **how):
        words = [sys.executable, "-c", KEEP, str(pause_s), str(well_after_s), sys.executable, "-u", "-c", code]
        how = {"stdout": subprocess.PIPE} | how
        process = subprocess.Popen(words, text=True, start_new_session=True, **how)
        started.append(process)
        return process

    yield start
    for process in started:
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(each.pid) == process.pid:
                    each.kill()
        process.communicate()


def test_a_process_that_ends_is_started_again(keep):
    """Killed or failed, and its log says so; each time after a longer pause, for what fails for good."""
    kept = keep(READY + "print('began'); os.kill(os.getpid(), 9)")
    lines = [next(kept.stdout) for _ in range(6)]
    assert lines[0] == lines[2] == lines[4] == "began\n"
    said = [re.search(r" ended with -9 after \d+ s; started again in ([\d.]+) s: ", line)[1] for line in lines[1::2]]
    assert said == ["0.05", "0.1", "0.2"]


def test_a_life_that_was_long_starts_the_pauses_anew(keep):
    """What failed a day ago says nothing of today."""
    kept = keep(READY, well_after_s=0)
    assert ["again in 0.05 s" in next(kept.stdout) for _ in range(3)] == [True] * 3


def test_what_never_got_ready_is_not_started_again(keep):
    """Whoever brought it up learns of it, with its exit code."""
    kept = keep("print('began'); raise SystemExit(3)")
    assert kept.wait(timeout=60) == 3
    assert [line.split(" ", 1)[-1][:33] for line in kept.stdout] == ["began\n", "ended with 3 before it was ready:"]


def test_what_a_dead_process_left_is_ended_with_it(keep):
    """Workers wait for a killed scheduler for ever, and the child of a killed server keeps its port."""
    kept = keep(READY + "child = os.fork() or time.sleep(600); print(child); os.kill(os.getpid(), 9)")
    left = int(next(kept.stdout))
    assert "started again" in next(kept.stdout)
    until(lambda: not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE)


def test_a_full_disk_does_not_end_the_keeper(keep, tmp_path):
    """It cannot say that it starts it again, and does."""
    lives = tmp_path / "lives"
    with Path("/dev/full").open("w", encoding="ascii") as full:
        kept = keep(READY + f"open({str(lives)!r}, 'a').write('.')", stdout=full)
        until(lambda: lives.exists() and lives.stat().st_size >= 3)
    assert kept.poll() is None


def test_what_is_told_to_stop_ends_in_good_order(keep):
    """The process is asked, its exit code is the keeper's, and it is not started again."""
    kept = keep(READY + "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('began'); signal.pause()")
    assert next(kept.stdout) == "began\n"
    kept.send_signal(signal.SIGTERM)
    assert (kept.wait(timeout=60), kept.stdout.read()) == (7, "")


def test_what_is_told_to_stop_while_nothing_runs_ends_too(keep):
    """Between two lives there is nothing to ask."""
    kept = keep(READY + "raise SystemExit(5)", pause_s=30, well_after_s=0)
    next(kept.stdout)
    kept.send_signal(signal.SIGTERM)
    assert kept.wait(timeout=20) == 5
