"""Retention as Airflow gets it: a DAG for packs that let go of something, once a day."""

from tests.dags.test_dags import PROJECT, change, parse

RETENTION = PROJECT / "dags" / "retention.py"


def test_only_packs_that_ask_let_go(packs):
    """`retention` makes the DAG, of one task; a pack that says nothing keeps everything and has none."""
    assert parse(RETENTION).dags == {}
    change(packs, "apple", "triggers:", "retention: 90d\ntriggers:")
    found = parse(RETENTION)
    assert (found.import_errors, sorted(found.dags)) == ({}, ["apple__prune"])
    dag = found.dags["apple__prune"]
    assert ([task.task_id for task in dag.tasks], dag.max_active_runs) == (["prune"], 1)
    assert dag.timetable.expression == "0 0 * * *"
