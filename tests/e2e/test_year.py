"""The year of the benchmark on a thinned calendar: through monitor, inbox, admission and chain, beside the timetables."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

YEAR = Path(__file__).parents[2] / "benchmarks" / "year.py"

pytestmark = [pytest.mark.slow, pytest.mark.fault]


def test_a_shift_in_the_year_is_a_training_and_a_better_champion(tmp_path):
    """Two looks, a quarter apart: what the monitor alerts is trained that day, and does better than the first for ever."""
    words = [sys.executable, str(YEAR), "--every", "91", "--until", "2013-09-30", "--folder", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "goal: not below monthly" in done.stdout, done.stdout + done.stderr
    assert re.search(
        r"^  evergreen 07-01  version  2  shift: newer rows would make a better model", done.stdout, re.MULTILINE
    )
    found = dict(re.findall(r"^(\w+) +mean ROC-AUC ([\d.]+ +\d+) trainings", done.stdout, re.MULTILINE))
    scored = {name: float(told.split()[0]) for name, told in found.items()}
    trained = {name: int(told.split()[1]) for name, told in found.items()}
    assert trained == {"weekly": 2, "monthly": 2, "never": 1, "evergreen": 2}
    assert scored["evergreen"] == scored["monthly"] > scored["never"]
