"""The monitor as Airflow gets it: a DAG for packs that ask for one, which runs its last task whatever came before."""

import subprocess
import sys
from datetime import UTC, datetime

from tests.dags.test_dags import HEAVY, PROJECT, change, parse, serialised

MONITORING = PROJECT / "dags" / "monitoring.py"


def ask(packs, name, rules="{schedule: '@daily'}"):
    """Let a pack be monitored."""
    change(packs, name, "triggers:", f"triggers:\n  drift: {rules}")


def test_only_packs_that_ask_are_monitored(packs):
    """`triggers.drift` makes the DAG; its schedule is the pack's, every hour where that says nothing."""
    assert parse(MONITORING).dags == {}
    ask(packs, "apple")
    ask(packs, "pear", "{}")
    found = parse(MONITORING)
    assert found.import_errors == {}
    assert {name: dag.timetable.expression for name, dag in found.dags.items()} == {
        "apple__monitor": "0 0 * * *",
        "pear__monitor": "0 * * * *",
    }


def test_the_monitor_looks_whatever_came_of_the_stages_before(packs):
    """Ingest → validate → monitor, of which the last runs when all are done: a refusal is a fault that it tells of."""
    ask(packs, "apple")
    dag = parse(MONITORING).dags["apple__monitor"]
    assert {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks} == {
        "ingest": [],
        "validate": ["ingest"],
        "monitor": ["ingest", "validate"],
    }
    assert [task.task_id for task in dag.tasks if task.trigger_rule == "all_done"] == ["monitor"]
    assert (dag.catchup, dag.max_active_runs, dag.tags) == (False, 1, {"evergreen", "monitor"})


def test_the_task_has_a_link_to_its_page(packs):
    """It leads to the run's page on the same server."""
    ask(packs, "apple")
    bag = parse(MONITORING)
    assert '"Drift report"' in serialised(bag)["apple__monitor"]
    from evergreen.orchestration.tasks import ReportLink

    class Key:
        run_id = "scheduled__2026-01-01T00:00:00+00:00"

    task = bag.dags["apple__monitor"].get_task("monitor")
    address = ReportLink().get_link(task, ti_key=Key)
    assert address.endswith("/evergreen/drift/apple/scheduled__2026-01-01T00%3A00%3A00%2B00%3A00")


def test_the_page_is_behind_airflows_door(packs):
    """Whoever Airflow knows sees what a run wrote, or found written; a run without a page is said to have none."""
    from airflow.api_fastapi.core_api.security import get_user
    from fastapi.testclient import TestClient

    from evergreen.data.store import Store
    from evergreen.database import connect
    from evergreen.loop.monitor import Watched
    from evergreen.orchestration.web import web_app
    from evergreen.settings import Settings

    settings = Settings.from_env()
    page = Store(settings).put_bytes(b"<!doctype html>what moved")
    found = Watched(
        pack="apple", as_of=datetime(2026, 1, 1, tzinfo=UTC), champion=1, kind="quiet", reasons=("nothing",), page=page
    )
    event = {"stage": "monitor", "value": found.model_dump(mode="json")}
    connect(settings.database_url).append("apple", "drift", event, run_id="watch__2026-01-01T00:00+00:00", key="one")
    connect(settings.database_url).append("apple", "receipt", {"stage": "monitor"}, run_id="watch__later", key="one")
    app = web_app()
    client = TestClient(app)
    address = "/drift/apple/2026-01-01T00:00%2B00:00"
    assert client.get(address).status_code == 401
    app.dependency_overrides[get_user] = lambda: None
    assert client.get(address).text == client.get("/drift/apple/later").text == "<!doctype html>what moved"
    assert client.get(address).headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/drift/apple/never").status_code == 404
    connect(settings.database_url).append("apple", "pruned", {"what": "look", "age": "90d"}, run_id="watch__later")
    assert client.get("/drift/apple/later").status_code == 200
    Store(settings).remove({page.hash})
    assert client.get("/drift/apple/later").status_code == 410
    assert client.get("/drift/apple/later").json()["detail"].endswith("by retention: 90d of apple")


def test_a_broken_rule_breaks_no_other_pack(packs):
    ask(packs, "apple", "{violated: 5 of 3}")
    ask(packs, "pear")
    assert sorted(parse(MONITORING).dags) == ["pear__monitor"]
    [error] = parse(PROJECT / "dags" / "broken_packs.py").import_errors.values()
    assert "5 of 3" in error


def test_parsing_imports_nothing_heavy(packs):
    """A fresh process that parses the file does not import what the tasks need, numpy included."""
    ask(packs, "apple")
    code = f"""
import sys
from airflow.dag_processing.dagbag import BundleDagBag
from pathlib import Path
before = set(sys.modules)
file = Path({str(MONITORING)!r})
bag = BundleDagBag(dag_folder=file, bundle_path=file.parent, bundle_name="dags-folder", load_op_links=False)
assert sorted(bag.dags) == ["apple__monitor"], bag.import_errors
heavy = {[*HEAVY, "fastapi", "numpy"]!r}
print(sorted(name for name in heavy if name in set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.strip().splitlines()[-1] == "[]"
