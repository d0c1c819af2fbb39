"""The keeper of a process: again when it ends, not when it never began, and never after it was told to stop."""

import signal
import subprocess
import sys

import pytest

KEEP = "import signal, sys; from evergreen.orchestration import keeper; "
KEEP += "signal.signal(signal.SIGTERM, keeper._tell); "
KEEP += "sys.exit(keeper.keep(sys.argv[2:], well_after_s=float(sys.argv[1]), pause_s=0.05))"


@pytest.fixture
def keep(tmp_path):
    """Keeps a Python program, for which a life of `well_after_s` is a start that went well."""
    started = []

    def start(code, *, well_after_s):
        words = [sys.executable, "-c", KEEP, str(well_after_s), sys.executable, "-u", "-c", code]
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_process_that_ends_is_started_again(keep):
    """Killed or failed, and its log says so."""
    kept = keep("import os; print('began'); os.kill(os.getpid(), 9)", well_after_s=0)
    lines = [next(kept.stdout) for _ in range(4)]
    assert lines[0] == lines[2] == "began\n"
    assert "ended with -9 after 0 s; started again in 0.05 s: " in lines[1]


def test_the_pause_grows_while_no_start_goes_well(keep):
    """So that what fails for good does not keep the machine busy."""
    once = "import os, time; first = not os.path.exists('f'); open('f', 'w'); time.sleep(0.5 * first)"
    kept = keep(once, well_after_s=0.4)
    assert [next(kept.stdout).split("started again in ")[1].split(" s")[0] for _ in range(3)] == ["0.05", "0.1", "0.2"]


def test_a_first_start_that_fails_is_final(keep):
    """Whoever brought it up learns of it, with its exit code."""
    kept = keep("print('began'); raise SystemExit(3)", well_after_s=60)
    assert (kept.wait(timeout=60), kept.stdout.read()) == (3, "began\n")


def test_what_is_told_to_stop_ends_in_good_order(keep):
    """The process is asked, its exit code is the keeper's, and it is not started again."""
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('began'); signal.pause()"
    kept = keep(code, well_after_s=0)
    assert next(kept.stdout) == "began\n"
    kept.send_signal(signal.SIGTERM)
    assert (kept.wait(timeout=60), kept.stdout.read()) == (7, "")


def test_what_is_told_to_stop_while_nothing_runs_ends_too(keep):
    """Between two lives there is nothing to ask."""
    kept = keep("raise SystemExit(5)", well_after_s=0)
    next(kept.stdout)
    kept.send_signal(signal.SIGTERM)
    assert kept.wait(timeout=60) == 5
