"""The rollback as Airflow gets it: a DAG for each pack, which a person starts with a reason."""

from tests.dags.test_dags import PROJECT, parse

ROLLBACK = PROJECT / "dags" / "rollback.py"


def test_each_pack_has_a_way_back(packs):
    """One task, no schedule; a person says why, and may say to which version."""
    found = parse(ROLLBACK)
    assert (found.import_errors, sorted(found.dags)) == ({}, ["apple__rollback", "pear__rollback"])
    dag = found.dags["apple__rollback"]
    assert ([task.task_id for task in dag.tasks], dag.schedule, dag.max_active_runs) == (["rollback"], None, 1)
    params = {name: dag.params.get_param(name) for name in dag.params}
    assert params["why"].schema == {"type": "string", "minLength": 1, "pattern": r"\S", "title": "Why"}
    assert (params["to"].value, params["to"].schema["type"]) == (None, ["null", "integer"])
