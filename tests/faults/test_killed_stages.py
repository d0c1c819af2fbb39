"""SIGKILL in every stage and in a look, and two processes at once: the end is that of an undisturbed run."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from evergreen.errors import JobError

pytestmark = pytest.mark.fault

STAGES = ["ingest", "validate", "snapshot", "train", "evaluate", "register", "promote"]
POINTS = {
    "ingest": ["put/3"],
    "validate": ["push/1"],
    "snapshot": ["append stage/1"],
    "train": ["wait/1"],
    "evaluate": ["append stage/1"],
    "register": ["log_text/1"],
    "promote": ["set_registered_model_alias/1"],
}
"""In the middle of a stage's act: its first objects pushed, its job started, its version made and not complete, its
promotion intended and not done; or just before its event. `make prove` has every point."""

LOOK = ["monitor/wait/1", "monitor/log_text/1", "monitor/append drift/1", "tell/keep/1", "tell/told/1"]
"""Its predictions being made, its page not yet beside the champion, its event not written, its alert kept or not."""


def tried(*trials):
    """What came of trials of `killed.py`, which runs in a process of its own: children can be forked and killed there."""
    script = Path(__file__).with_name("killed.py")
    env = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(trials)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    place = tmp_path_factory.mktemp("killed")
    row = [f"{stage}/{call}" for stage, calls in POINTS.items() for call in calls]
    names = ["row", "adopted", "rivals", "twins"]
    answers = tried(
        [f"{place}/row", "next", "row", *row],
        [f"{place}/adopted", "first", "adopted"],
        [f"{place}/rivals", "first", "race", "one", "two"],
        [f"{place}/twins", "first", "race", "one", "one"],
    )
    return dict(zip(names, answers, strict=True))


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_as_an_undisturbed_one(trials):
    """Killed seven times, once in each stage, and tried again from the first stage on each time: the same end."""
    found = trials["row"]
    assert found["deaths"] == ["killed"] * 7
    assert found["state"] == found["undisturbed"]


@pytest.mark.slow
def test_a_run_retried_after_its_promotion_is_still_judged_against_the_champion_before(trials):
    """When it is champion itself, a run that is performed again keeps its comparison, its verdict and its outcome."""
    state = trials["row"]["state"]
    assert (state["promoted"]["previous"], state["promoted"]["champion"], state["outcome"]) == (1, 2, "promoted")
    assert "not worse than version 1" in state["promoted"]["verdict"]["reasons"][0]


@pytest.mark.slow
def test_the_training_job_of_a_killed_stage_is_adopted(trials):
    """The waiting process is killed; the next one finds the same job alive, and training is begun once."""
    found = trials["adopted"]
    assert (found["death"], found["found"]) == ("killed", "alive")
    assert found["adopted"] == found["started"]
    assert found["state"]["trainings begun"] == 1
    assert found["state"]["stage events"] == STAGES


@pytest.mark.slow
def test_two_runs_at_once_make_one_version_when_they_learn_the_same(trials):
    """Both end well, each stage after the other's: one does the work, the other has receipts, and nothing is doubled."""
    found = trials["rivals"]
    assert sorted(racer["outcome"] for racer in found["racers"]) == ["promoted", "unchanged"]
    state = found["state"]
    assert Counter(state["stage events"]) == Counter(STAGES) + Counter(["ingest", "promote"])
    assert state["versions"] == [[1, ["champion"], True]]
    assert (state["mlflow runs"], state["trainings begun"], state["failures"]) == (["FINISHED"], 1, [])
    assert (state["promotions"], state["first bad event"]) == (["intended", "done"], None)
    assert (state["left in jobs"], state["leases"]) == ([], [])


@pytest.mark.slow
def test_two_processes_of_one_run_do_its_work_once(trials):
    """A retry that comes while the first attempt lives waits for it, stage by stage, and both hand on the same."""
    found = trials["twins"]
    state = found["state"]
    assert [racer["promoted"] for racer in found["racers"]] == [state["promoted"]] * 2
    assert (state["stage events"], state["receipts"], state["outcome"]) == (STAGES, [], "promoted")
    assert (state["versions"], state["mlflow runs"]) == ([[1, ["champion"], True]], ["FINISHED"])
    assert (state["promotions"], state["trainings begun"], state["failures"]) == (["intended", "done"], 1, [])
    assert (state["left in jobs"], state["leases"]) == ([], [])


@pytest.mark.slow
def test_a_killed_training_job_is_a_failure_and_the_retry_trains_again(home, kept):
    """The job's own process dies: the run says so, the champion stays, and the same run tried again ends well."""
    home.write_model(
        '    print("training begins")\n',
        '    import os\n    tried = job.folder / "tried"\n    if not tried.exists():\n        tried.touch()\n'
        "        os.kill(os.getpid(), 9)\n",
    )
    home.refuses(JobError, "shot", says=["train job train-tide-", "killed", "log.txt", "run again"], left="train")
    values = home.perform("shot")
    assert (values["promote"].champion, home.leftovers(), home.processes()) == (1, [], [])


@pytest.mark.slow
def test_a_look_killed_at_every_turn_ends_as_an_undisturbed_one(tmp_path):
    """Killed while it scores, reports, records and alerts, and tried again each time: one look, one page, one alert."""
    ((found),) = tried([str(tmp_path / "look"), "shift", "row", *LOOK])
    assert found["deaths"] == ["killed"] * len(LOOK)
    assert found["state"] == found["undisturbed"]
    assert (len(found["state"]["looks"]), len(found["state"]["alerts"])) == (1, 1)


@pytest.mark.prove
@pytest.mark.parametrize("start", ["first", "next", "shift", "fault"])
def test_a_run_killed_at_any_call_ends_as_an_undisturbed_one(tmp_path, start, capsys):
    """Before every append, put, push, git command, job, and write to MLflow: one trial each, one table."""
    ((found),) = tried([str(tmp_path / "points"), start, "points"])
    whole = found["undisturbed"]
    differing = {}
    for trial in found["trials"]:
        assert trial["death"] == "killed"
        differing[trial["point"]] = [name for name in whole if trial["state"][name] != whole[name]]
    lines = [
        f"{point:45} {'differs: ' + ', '.join(names) if names else 'as undisturbed'}"
        for point, names in differing.items()
    ]
    with capsys.disabled():
        sys.stdout.write("\n".join([f"\n{len(lines)} points of {start}", *lines, ""]))
    assert len(differing) > {"first": 60, "next": 60, "shift": 40, "fault": 40}[start]
    assert {point: names for point, names in differing.items() if names} == {}
