"""Stages as functions of their keys, on a real database and a real store."""

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from evergreen import database as db
from evergreen import keys
from evergreen.data.store import Store
from evergreen.errors import SourceError
from evergreen.pack import Pack
from evergreen.run import Ref, Value
from evergreen.settings import Settings

PACK = """
description: Is it more?
owner: tests@example.com
source: {{kind: csv, path: rows.csv}}
data: {{target: more, event_time: at, partition: {partition}, train: 62d, validation: 31d, holdout: 31d}}
training: {{call: "model:train"}}
gate: {{primary: {{metric: roc_auc}}}}
"""
NOON = datetime(2024, 5, 15, 12, 34, 56, tzinfo=UTC)


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


class Made(Value):
    """What the stage of these tests gives: an object, and how often the stage had acted by then."""

    object: Ref
    turn: int

    def summary(self) -> str:
        return f"turn {self.turn}"


class Remade(Value):
    """A later shape of it."""

    object: Ref
    times: int


@pytest.fixture
def settings(tmp_path):
    """A project with a lock file, and a home that is still to be made."""
    (tmp_path / "requirements.txt").write_text("numpy==2.3\n")
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home"), "EVERGREEN_PROJECT": str(tmp_path)})
    return settings.model_copy(update={"packs": tmp_path / "packs"})


def write_pack(settings, *, partition="day", clock=""):
    folder = settings.packs / "more"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pack.yaml").write_text(PACK.format(partition=partition) + clock)
    (folder / "model.py").write_text("def train(data, job): ...\n")
    return Pack.load(folder)


@pytest.fixture
def begin(settings):
    """Begin a run of the pack."""

    def begin(run_id="first", *, as_of=None, scheduled=NOON, reason="a test asked", force=False, **pack):
        return keys.begin(
            settings, write_pack(settings, **pack), run_id, as_of=as_of, scheduled=scheduled, reason=reason, force=force
        )

    return begin


class Stage:
    """A stage that puts its text into the store, and counts how often it acts."""

    def __init__(self, settings: Settings, code: Path) -> None:
        self.store = Store(settings)
        self.database = db.connect(settings.database_url)
        self.code = code
        self.turns = 0
        code.write_text("the code it runs\n")

    def perform(self, run, *, shape=Made, fails=None, **parts):
        """The stage for `run`; `parts` are those of its key that the test is about."""
        told = {"inputs": {"data": "a"}, "parameters": {"params": {"epochs": 5}}, **parts}

        def act():
            if fails is not None:
                raise fails
            self.turns += 1
            ref = self.store.put_bytes(b"what the stage made")
            self.store.push([ref])
            return shape.model_validate({"object": ref, [*shape.model_fields][1]: self.turns})

        @keys.recorded
        def train(run):
            return keys.perform(
                run,
                "train",
                result=shape,
                code=(self.code,),
                act=act,
                outputs=lambda made: [made.object],
                intact=self.store.verify,
                **told,
            )

        return train(run)

    def events(self, kind):
        return self.database.events("more", kind=kind)


@pytest.fixture
def stage(settings, tmp_path):
    return Stage(settings, tmp_path / "code.py")


def test_as_of_is_what_was_asked_for(begin):
    """The `as_of` asked for wins over the logical date."""
    assert begin(as_of=at("2024-03-01")).as_of == at("2024-03-01")


def test_the_logical_date_stands_in_for_it(begin):
    """Cron and backfills ask for no as-of: the date they are scheduled for is it."""
    assert begin(scheduled=at("2024-03-01")).as_of == at("2024-03-01")


@pytest.mark.parametrize(
    ("partition", "expected"),
    [("hour", "2024-05-15T12:00"), ("day", "2024-05-15"), ("week", "2024-05-13"), ("month", "2024-05-01")],
)
def test_as_of_is_the_end_of_the_last_complete_partition(begin, partition, expected):
    """A period that is not over at the instant asked for is not seen."""
    assert begin(as_of=NOON, partition=partition).as_of == at(expected)


def test_as_of_is_kept_by_later_calls(begin):
    """A retried or cleared run is what it was when it began, whatever is asked of it then."""
    first = begin(as_of=NOON, reason="the schedule")
    again = begin(as_of=at("2024-06-01"), scheduled=at("2024-07-01"), reason="another", force=True, partition="month")
    assert (again.as_of, again.reason, again.force) == (first.as_of, "the schedule", False)


def test_two_runs_have_an_as_of_each(begin):
    """What one run keeps is no other's."""
    begin("first", as_of=at("2024-03-01"))
    assert begin("second", as_of=at("2024-04-01")).as_of == at("2024-04-01")


def test_instants_since_the_home_was_made_go_through_the_clock(begin, settings):
    """`start + elapsed × speed`: ten minutes at a day a minute are ten days."""
    made_at = db.connect(settings.database_url).made_at()
    run = begin(scheduled=made_at + timedelta(minutes=10), clock="clock: {start: 2013-04-01, speed: 1440}\n")
    assert run.as_of == at("2013-04-11")


def test_instants_before_the_home_was_made_are_taken_as_they_are(begin):
    """A backfill says which date it means."""
    assert begin(scheduled=at("2013-02-01"), clock="clock: {start: 2013-04-01}\n").as_of == at("2013-02-01")


def test_the_beginning_of_a_run_is_an_event(begin, stage):
    """One event, however often it is begun, with as-of, reason and force."""
    for _ in range(2):
        begin(as_of=at("2024-03-01"), force=True)
    (event,) = stage.events("run")
    assert event.run_id == "first"
    assert event.body == {"as_of": "2024-03-01T00:00:00+00:00", "reason": "a test asked", "force": True}


def test_the_same_work_is_not_done_again(begin, stage):
    """Another run with the same key gets the same value, and a receipt that names the first run."""
    made = stage.perform(begin("first"))
    assert stage.perform(begin("second")) == made
    assert stage.turns == 1
    (receipt,) = stage.events("receipt")
    assert (receipt.run_id, receipt.key) == ("second", stage.events("stage")[0].key)
    assert {key: receipt.body[key] for key in ("stage", "of", "verified")} == {
        "stage": "train",
        "of": "first",
        "verified": True,
    }


def test_a_retry_needs_no_receipt(begin, stage):
    """The same run, performed again after its value was recorded, finds it, and adds nothing."""
    made = stage.perform(begin())
    assert stage.perform(begin()) == made
    assert (stage.turns, len(stage.events("stage")), stage.events("receipt")) == (1, 1, [])


@pytest.mark.parametrize(
    "parts", [{"inputs": {"data": "b"}}, {"parameters": {"params": {"epochs": 6}}}], ids=["inputs", "parameters"]
)
def test_work_is_done_when_it_is_asked_for_differently(begin, stage, parts):
    """Another input, or another parameter at any depth, is another key."""
    stage.perform(begin("first"))
    assert stage.perform(begin("second"), **parts).turn == 2


def test_work_is_done_when_the_code_changed(begin, stage):
    """Another byte in a file that the stage runs is another key, in a process that lives on too."""
    stage.perform(begin("first"))
    stage.code.write_text("other code\n")
    assert stage.perform(begin("second")).turn == 2


@pytest.mark.parametrize("what", ["image", "lock"])
def test_work_is_done_when_the_environment_changed(begin, stage, tmp_path, what):
    """Another image or another lock file is another key."""
    run = begin("first")
    stage.perform(run)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "requirements.txt").write_text("numpy==2.4\n")
    changes = {"image": {"image": "evergreen@sha256:1"}, "lock": {"project": tmp_path / "other"}}[what]
    run = dataclasses.replace(begin("second"), settings=run.settings.model_copy(update=changes))
    assert stage.perform(run).turn == 2


@pytest.mark.parametrize("where", ["cache", "remote"])
def test_an_output_that_can_be_mended_is_mended(begin, stage, settings, where):
    """An object that is altered here or there is taken from the other place: the work is not done again."""
    made = stage.perform(begin("first"))
    alter(settings, made.object, where)
    stage.perform(begin("second"))
    assert stage.turns == 1
    assert stage.store.read_bytes(made.object) == b"what the stage made"


def test_an_output_altered_everywhere_is_made_again(begin, stage, settings):
    """What an earlier run did is not taken on trust: nothing intact is left, so the stage acts, and no receipt is given."""
    made = stage.perform(begin("first"))
    for where in ("cache", "remote"):
        alter(settings, made.object, where)
    again = stage.perform(begin("second"))
    assert (again.turn, stage.events("receipt")) == (2, [])
    assert stage.store.read_bytes(again.object) == b"what the stage made"


def alter(settings, ref, where):
    root = settings.cache if where == "cache" else Path(settings.data_remote)
    file = root / "files" / "md5" / ref.hash[:2] / ref.hash[2:]
    file.chmod(0o644)
    file.write_bytes(b"something else")


def test_a_value_of_another_shape_is_made_again(begin, stage):
    """What another version of Evergreen wrote, in a shape that is not known now, is not guessed at."""
    stage.perform(begin("first"))
    assert stage.perform(begin("second"), shape=Remade).times == 2
    assert stage.events("receipt") == []


def test_a_forced_run_does_the_work_again_once(begin, stage):
    """`force` ignores what other runs did; its own retry finds what it did itself."""
    stage.perform(begin("first"))
    assert stage.perform(begin("second", force=True)).turn == 2
    assert stage.perform(begin("second", force=True)).turn == 2


def test_the_event_tells_the_whole_key(begin, stage, settings):
    """A stage's event has every part that its key was made of, its value, and what was said of it."""
    made = stage.perform(begin())
    (event,) = stage.events("stage")
    assert event.body["parts"] == {
        "stage": "train",
        "inputs": {"data": "a"},
        "parameters": {"params": {"epochs": 5}},
        "code": keys.code_hash((stage.code,)),
        "environment": keys.environment(settings),
    }
    assert (event.body["value"], event.body["summary"]) == (made.model_dump(mode="json"), "turn 1")


def test_a_failure_is_recorded_and_raised(begin, stage):
    """A stage that fails leaves an event with what is wrong and the fix; its value is not there, so a retry acts."""
    error = SourceError("rows.csv has no column 'more'", fix="name one of: at")
    with pytest.raises(SourceError, match="no column 'more'"):
        stage.perform(begin(), fails=error)
    (failure,) = stage.events("failure")
    assert failure.body == {"stage": "train", "error": "SourceError", "what": error.what, "fix": error.fix}
    assert stage.perform(begin()).turn == 1


def test_a_failure_of_another_kind_is_recorded_too(begin, stage):
    """What no one foresaw is an event as well, without a fix."""
    with pytest.raises(ZeroDivisionError):
        stage.perform(begin(), fails=ZeroDivisionError("by zero"))
    (failure,) = stage.events("failure")
    assert failure.body == {"stage": "train", "error": "ZeroDivisionError", "what": "by zero", "fix": None}


def test_code_is_known_by_name_and_bytes(tmp_path):
    """Whatever folder it lies in and in whatever order it is named; another name or byte is other code."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name in ("a.py", "b.py"):
            (tmp_path / folder / name).write_text(f"# {name}\n")
    here, there = ([tmp_path / folder / name for name in ("a.py", "b.py")] for folder in ("here", "there"))
    assert keys.code_hash(tuple(here)) == keys.code_hash(tuple(there[::-1]))
    before = keys.code_hash(tuple(here))
    assert keys.code_hash((here[0].rename(tmp_path / "here" / "c.py"), here[1])) != before
    there[0].write_text("# b.py\n")
    assert keys.code_hash(tuple(there)) != before


def test_code_is_known_wherever_package_and_packs_lie(tmp_path):
    """A pack whose folder sorts before the package's is the same code as one whose folder sorts after it."""
    hashes = set()
    for number, packs in enumerate(("a", "z")):
        files = [tmp_path / str(number) / name for name in ("m/jobs.py", f"{packs}/model.py", "m/__init__.py")]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"# {file.name}\n")
        hashes.add(keys.code_hash(tuple(files)))
    assert len(hashes) == 1


def test_what_is_gone_outside_of_the_store_is_made_again(begin, stage):
    """A value whose git tag or MLflow version is not there any more is no value to take over."""
    assert stage.perform(begin()).turn == 1
    assert stage.perform(begin("second"), exists=lambda made: made.turn == 1).turn == 1
    assert stage.perform(begin("third"), exists=lambda made: made.turn > 1).turn == 2


def test_packages_are_known_by_the_lock_file(settings, tmp_path):
    """The environment of a stage has the hash of requirements.txt; None where there is none."""
    assert len(keys.environment(settings)["lock"]) == 64
    elsewhere = settings.model_copy(update={"project": tmp_path / "elsewhere"})
    assert keys.environment(elsewhere)["lock"] is None
