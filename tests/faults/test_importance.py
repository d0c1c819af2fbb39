"""A run whose model's importance cannot be measured: it ends as it would, and says what is not known, and why."""

import json

import pytest
from tests.faults.conftest import AS_OF, DAYS, LATER, MORE, NAME, RULES, SCHEDULED, Home, perform_stage

from evergreen import keys, looks, reports
from evergreen.evaluation.report import markdown
from evergreen.loop.monitor import monitor, page_of
from evergreen.stages import judging

pytestmark = pytest.mark.fault

DIES = "os.kill(os.getpid(), signal.SIGKILL)"
REFUSES = 'raise ValueError("wind and height do not go together")'


def unstable(home: Home, outcome: str) -> None:
    """A model to which `outcome` happens with the third large frame: that of the first column that is shuffled."""
    home.write_model(
        "    def predict(self, frame):\n",
        "    large = 0\n\n    def predict(self, frame):\n        import os, signal\n"
        "        self.large += len(frame) > 64\n"
        f"        if self.large == 3:\n            {outcome}\n",
    )


def watch(home: Home):
    run = keys.begin(
        home.settings, home.pack, "look", as_of=LATER, scheduled=SCHEDULED, reason="a test", kind="watch", force=True
    )
    values = {}
    for stage in ("ingest", "validate"):
        perform_stage(run, stage, values)
    return monitor(run, values["ingest"], values["validate"])


@pytest.mark.parametrize(
    ("outcome", "note", "known"),
    [
        (DIES, "importance is not known: the job died that was to measure it: the score job ", []),
        (
            REFUSES,
            "importance is known of 1 of 2 columns: the model fails where 'height' is shuffled: ValueError: ",
            ["wind"],
        ),
    ],
)
def test_a_run_does_not_fail_for_want_of_importance(tmp_path, outcome, note, known):
    """The stage's summary, the version's files and its report say what is not known; the verdict is as it would be."""
    home = Home.make(tmp_path)
    unstable(home, outcome)
    values = home.perform("a run")
    evaluated = values["evaluate"]
    assert evaluated.importance_note.startswith(note)
    assert evaluated.importance_note in evaluated.summary()
    assert [each.column for each in evaluated.importance] == known
    assert values["promote"].champion == 1
    told = json.loads(home.registry.artifact(NAME, 1, "importance.json"))
    assert (told["note"], [each["column"] for each in told["columns"]]) == (evaluated.importance_note, known)
    about = looks.Reference.model_validate_json(home.registry.artifact(NAME, 1, looks.REFERENCE))
    assert about.importance_note == evaluated.importance_note
    assert note.removeprefix("importance").split("'")[0] in markdown(reports.of_version(home.settings, NAME, 1, ""))
    assert judging.rejudge(home.settings, home.events("verdict")[-1]).wrong == ()


def test_the_monitor_says_that_importance_is_not_known(tmp_path):
    """What it could not measure is compared with nothing, and is no shift; reasons and page say why."""
    home = Home.make(tmp_path, days=range(DAYS + MORE))
    home.write(triggers=RULES)
    switch = tmp_path / "switch"
    unstable(home, f"if os.path.exists({str(switch)!r}): {DIES}")
    home.perform("first", as_of=AS_OF)
    switch.touch()
    watched = watch(home)
    reason = "importance is not known: the job died that was to measure it"
    assert watched.kind == "quiet"
    assert any(each.startswith(reason) for each in watched.reasons)
    assert reason.encode() in page_of(home.settings, NAME, "watch__look")
