"""A source of a team: rows in a PostgreSQL, the way there in an Airflow connection, its password nowhere else."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest
from sqlalchemy.engine import make_url

from evergreen.orchestration import connections

pytestmark = [pytest.mark.slow, pytest.mark.fault]

EVERGREEN = str(Path(sys.executable).with_name("evergreen"))
PACK = """
description: Will the water reach the road?
owner: gauge@example.com
source: {kind: sql, connection: gauges, table: heights}
data: {target: flooded, event_time: seen_at, train: 6d, validation: 2d, holdout: 3d}
training: {call: "model:train"}
gate: {primary: {metric: roc_auc}}
"""


@pytest.fixture(scope="module")
def gauges(postgres):
    """The URL of a database with a role that needs a password, and twelve days of rows; the password."""
    url = make_url(postgres.database())
    chance = np.random.default_rng(7)
    with psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
        connection.execute("CREATE TABLE heights (seen_at timestamptz, height float8, flooded bool)")
        first = datetime(2024, 1, 1, tzinfo=UTC)
        rows = [
            (first + timedelta(hours=n), float(height), bool(height + noise > 0.5))
            for n, (height, noise) in enumerate(chance.normal(size=(24 * 12, 2)))
        ]
        connection.cursor().executemany("INSERT INTO heights VALUES (%s, %s, %s)", rows)
    return url.set(drivername="postgres", password="hush-hush").render_as_string(hide_password=False)


MODEL = "from evergreen.training import tabular\n\n\ndef train(data, job):\n    tabular.train(data, job)\n"


def test_a_run_reads_by_a_connection_of_airflow(gauges, tmp_path, monkeypatch):
    """Kept in Airflow's database it is found by a task and by a command; the password is in no event, log or object."""
    pack = tmp_path / "packs" / "flood"
    pack.mkdir(parents=True)
    (pack / "pack.yaml").write_text(PACK)
    (pack / "model.py").write_text(MODEL)
    for name in [name for name in os.environ if name.startswith(("AIRFLOW", "EVERGREEN"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EVERGREEN_PACKS", str(pack.parent))

    def ask(*words):
        return subprocess.run([EVERGREEN, *words], capture_output=True, text=True, check=False)

    assert ask("airflow", "connections", "add", "gauges", "--conn-uri", gauges).returncode == 0
    done = ask("run", "flood", "--as-of", "2024-01-13")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = [file for file in (tmp_path / "home").rglob("*") if file.is_file() and b"hush-hush" in file.read_bytes()]
    assert (kept, "hush-hush" in done.stdout + done.stderr) == ([], False)

    url, found = make_url(gauges), connections.connection_of("gauges")
    assert (found.kind, found.host, found.port, found.schema) == ("postgres", url.host, url.port, url.database)
    assert (found.login, found.password) == (url.username, "hush-hush")
