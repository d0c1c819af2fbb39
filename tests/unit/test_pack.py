"""What a user may write in pack.yaml, as values. What is wrong in one: tests/contract/test_invalid_packs.py."""

import os
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta

import pytest

from evergreen.errors import PackError
from evergreen.pack import (
    AdmissionPolicy,
    Budget,
    Clock,
    Data,
    Pack,
    find,
    load,
    load_policy,
    parse_duration,
    parse_instant,
)

PACK = """
description: Is it more?
owner: tests@example.com
source: {kind: csv, path: rows.csv}
clock: {start: 2013-04-01, speed: 1440}
data: {target: more, event_time: at, train: 60d, validation: 36h, holdout: 2w}
expectations:
  - expect_column_values_to_not_be_null: {column: at, mostly: 0.9}
  - expect_table_row_count_to_be_between: {min_value: 1}
training: {call: "model:train", timeout: 90m}
gate: {primary: {metric: roc_auc}}
"""


@pytest.fixture
def folder(tmp_path):
    """The folder of a sound pack called `more`."""
    folder = tmp_path / "packs" / "more"
    folder.mkdir(parents=True)
    (folder / "pack.yaml").write_text(PACK)
    (folder / "model.py").write_text("def train(data, job): ...\n")
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("45s", timedelta(seconds=45)),
        ("90m", timedelta(minutes=90)),
        ("2h", timedelta(hours=2)),
        ("60d", timedelta(days=60)),
        ("1w", timedelta(days=7)),
        (" 60d ", timedelta(days=60)),
    ],
)
def test_durations(text, expected):
    """A whole number and a unit."""
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["60", "d", "1.5d", "-1d", "60 days", "1y", "", "1d2h"])
def test_other_durations_say_what_to_write(text):
    """What is not a whole number and a unit is refused with an example."""
    with pytest.raises(ValueError, match="as in 60d"):
        parse_duration(text)


@pytest.mark.parametrize(("written", "expected"), [("60d", "60d"), ("36h", "36h"), ("90m", "90m"), ("2w", "14d")])
def test_durations_are_shown_in_the_largest_unit(written, expected):
    """A duration's JSON, which rules are hashed by, does not depend on the unit it was written in."""
    whole = Data(target="y", event_time="at", max_staleness=written)
    assert whole.model_dump(mode="json")["max_staleness"] == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("2013-04-01", datetime(2013, 4, 1, tzinfo=UTC)),
        (date(2013, 4, 1), datetime(2013, 4, 1, tzinfo=UTC)),
        ("2013-04-01T06:00", datetime(2013, 4, 1, 6, tzinfo=UTC)),
        ("2013-04-01T06:00:00+02:00", datetime(2013, 4, 1, 4, tzinfo=UTC)),
    ],
)
def test_instants_are_in_utc(written, expected):
    """A date is its first instant; a time without a zone is UTC; another zone is turned into UTC."""
    instant = parse_instant(written)
    assert (instant, instant.tzinfo) == (expected, UTC)


@pytest.mark.parametrize("text", ["soon", "2013-13-01", ""])
def test_other_instants_say_what_to_write(text):
    """What is no time is refused with an example."""
    with pytest.raises(ValueError, match="write 2013-04-01"):
        parse_instant(text)


@pytest.mark.parametrize(
    ("partition", "shortest", "too_short"),
    [("hour", "1h", "59m"), ("day", "1d", "23h"), ("week", "7d", "6d"), ("month", "31d", "30d")],
)
def test_windows_hold_a_partition(partition, shortest, too_short):
    """Each window is at least as long as the longest period, so that it cannot be empty by construction."""
    given = {"target": "y", "event_time": "at", "partition": partition}
    windows = dict.fromkeys(("train", "validation", "holdout"), shortest)
    assert Data(**given, **windows).partition == partition
    with pytest.raises(ValueError, match=f"holdout is shorter than one {partition}"):
        Data(**given, **{**windows, "holdout": too_short})


def test_a_pack_is_named_after_its_folder(folder):
    """Name and folder are not written in it; the dataset has the same name."""
    pack = Pack.load(folder)
    assert (pack.name, pack.folder, pack.dataset) == ("more", folder, "more")


def test_what_is_not_written_has_a_default(folder):
    """Two required files, few required keys."""
    pack = Pack.load(folder)
    assert (pack.data.partition, pack.data.task, pack.data.lookback, pack.data.quarantine) == ("day", "binary", 0, 0.02)
    assert (pack.training.seed, pack.training.gpus, pack.training.params) == (7, "auto", {})
    assert (pack.gate.primary.test, pack.gate.primary.confidence) == ("non_inferior", 0.95)
    assert pack.triggers.schedule is None


def test_expectations_are_verbatim(folder):
    """Great Expectations' own types and arguments, in their order."""
    found = [(expectation.type, expectation.arguments) for expectation in Pack.load(folder).expectations]
    assert found == [
        ("expect_column_values_to_not_be_null", {"column": "at", "mostly": 0.9}),
        ("expect_table_row_count_to_be_between", {"min_value": 1}),
    ]


def test_scalars_are_those_of_yaml_1_2(folder):
    """Country codes stay text and small numbers are numbers, in expectations, parameters, rules and keys."""
    text = PACK.replace("more, event_time", "no, event_time")
    text = text.replace(
        "- expect_table_row",
        "- expect_column_values_to_be_in_set: {column: on, value_set: [NO, SE]}\n  - expect_table_row",
    )
    text = text.replace("timeout: 90m", "params: {rate: 1e-4, epochs: 010, at: 12:30, no: 2013-04-01}")
    (folder / "pack.yaml").write_text(text.replace("roc_auc", "roc_auc, margin: 1e-3"))
    pack = Pack.load(folder)
    assert pack.expectations[1].arguments == {"column": "on", "value_set": ["NO", "SE"]}
    assert pack.training.params == {"rate": 0.0001, "epochs": 10, "at": "12:30", "no": "2013-04-01"}
    assert (pack.data.target, pack.gate.primary.margin) == ("no", 0.001)
    assert pack.clock == Clock(start=datetime(2013, 4, 1, tzinfo=UTC), speed=1440)


def test_a_number_past_all_measure_is_refused(folder):
    """Python makes no integer of five thousand digits; the message shows the first of them."""
    (folder / "pack.yaml").write_text(PACK.replace("timeout: 90m", f"seed: {'1' * 5000}"))
    with pytest.raises(PackError, match=r":10: '1{60}'… is too long for a number") as caught:
        Pack.load(folder)
    assert len(caught.value.what) < 400


def test_a_pack_cannot_be_changed(folder):
    """Packs are values."""
    with pytest.raises(ValueError, match="frozen"):
        Pack.load(folder).owner = "somebody else"


def test_packs_that_say_the_same_are_equal(folder):
    """Comments and order do not matter."""
    before = Pack.load(folder)
    (folder / "pack.yaml").write_text("# the same\n" + PACK)
    assert Pack.load(folder) == before


def test_code_hash_follows_the_python(folder):
    """Another byte in the pack's Python is another hash; other files do not matter."""
    before = Pack.load(folder).code_hash
    (folder / "README.md").write_text("a card\n")
    assert Pack.load(folder).code_hash == before
    (folder / "model.py").write_text("def train(data, job): pass\n")
    assert Pack.load(folder).code_hash != before


def test_the_card_is_the_readme(folder):
    """The model card is the folder's README; where there is none, the description."""
    assert Pack.load(folder).card == "Is it more?"
    (folder / "README.md").write_text("# more\n")
    assert Pack.load(folder).card == "# more\n"


def test_loading_a_pack_runs_none_of_its_python(folder):
    """A pack whose Python cannot even be imported loads: only jobs import it."""
    (folder / "model.py").write_text("raise SystemExit('imported')\n")
    assert Pack.load(folder).name == "more"


def test_packs_are_found_by_their_yaml(folder):
    """Folders with a pack.yaml, sorted; other folders are none of its business."""
    packs = folder.parent
    (packs / "notes").mkdir()
    (packs / "less").mkdir()
    (packs / "less" / "pack.yaml").write_text("not a pack")
    assert [found.name for found in find(packs)] == ["less", "more"]


def test_an_unknown_pack_suggests_the_nearest(folder):
    """A name that is nearly right is answered with the right one."""
    with pytest.raises(PackError, match="there is no pack 'mroe'") as caught:
        load(folder.parent, "mroe")
    assert caught.value.fix == "did you mean 'more'?"


@pytest.mark.parametrize("name", ["More-2", "main"])
def test_a_folder_that_cannot_be_a_name_is_refused(folder, name):
    """Names become DAG ids, branches and tables: lower-case letters, digits and _; `main` is a branch already."""
    with pytest.raises(PackError, match=f"{name!r} cannot name a pack"):
        Pack.load(folder.rename(folder.parent / name))


def test_a_name_may_begin_like_a_branch_that_is_there(folder):
    """Only `main` itself is taken."""
    assert Pack.load(folder.rename(folder.parent / "main_road")).dataset == "main_road"


def test_importing_the_module_imports_nothing_heavy():
    """Airflow parses packs often: no data frames, no frameworks."""
    heavy = "{'polars', 'pandas', 'numpy', 'torch', 'mlflow', 'great_expectations', 'dvc', 'airflow'}"
    code = f"import sys, evergreen.pack; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_admission_makes_of_alerts_is_read_and_comes_back_from_its_json(folder):
    """A decision keeps the policy that it was made under as JSON."""
    said = "{dedupe: 10m, confirm: {windows: 2 of 3, each: 90m}, cooldown: 0s, budget: {runs: 4, per: 1w}, brake: 9}"
    (folder / "pack.yaml").write_text(f"{PACK}triggers: {{on_new_data: true, admission: {said}}}\n")
    triggers = Pack.load(folder).triggers
    policy = triggers.admission
    assert triggers.on_new_data is True
    assert (policy.dedupe, policy.cooldown, policy.brake) == (timedelta(minutes=10), timedelta(0), 9)
    assert policy.confirm is not None
    assert (policy.confirm.heard, policy.confirm.of, policy.confirm.each) == (2, 3, timedelta(minutes=90))
    assert policy.budget == Budget(runs=4, device_hours=None, per=timedelta(days=7))
    assert AdmissionPolicy.model_validate(policy.model_dump(mode="json")) == policy


def test_a_pack_that_says_nothing_of_alerts_has_the_defaults(folder):
    """A storm of alerts is one run in six hours, and updates of data are no alerts."""
    triggers = Pack.load(folder).triggers
    assert triggers.on_new_data is False
    assert triggers.admission == AdmissionPolicy(dedupe=timedelta(hours=1), cooldown=timedelta(hours=6), brake=60)
    assert (triggers.admission.confirm, triggers.admission.budget) == (None, None)


def test_a_clock_shows_no_later_than_the_last_instant_there_is():
    """An alert may name any as-of."""
    clock = Clock(start=datetime(2013, 4, 1, tzinfo=UTC), speed=1440)
    made_at = datetime(2026, 11, 21, tzinfo=UTC)
    assert clock.at(made_at, made_at) == clock.start
    assert clock.at(made_at + timedelta(minutes=1), made_at) == clock.start + timedelta(days=1)
    assert clock.at(made_at - timedelta(minutes=1), made_at) == made_at - timedelta(minutes=1)
    assert clock.at(datetime(9999, 1, 1, tzinfo=UTC), made_at) == datetime.max.replace(tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    [
        "{cooldown: 1h, brake: 9}",
        "admission:\n  cooldown: 1h\n  brake: 9\n",
        PACK + "triggers: {schedule: '@daily', admission: {cooldown: 1h, brake: 9}}",
    ],
    ids=["bare", "named", "pack"],
)
def test_a_policy_is_read_from_a_file_of_its_own(tmp_path, text):
    """With or without the word `admission`, or within a whole pack; what is not said is as it is for a pack."""
    (tmp_path / "other.yaml").write_text(text)
    assert load_policy(tmp_path / "other.yaml") == AdmissionPolicy(cooldown=timedelta(hours=1), brake=9)


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("brake: 9\ncooldwn: 1h", ":2: triggers.admission.cooldwn: unknown key", "did you mean 'cooldown'?"),
        ("admission:\n  budget:\n    runs: 0\n", ":3: triggers.admission.budget.runs: 0 input", "change the value"),
        (
            PACK + "triggers:\n  admission: {brake: 0}\n",
            ":13: triggers.admission.brake: 0 input",
            "change the value",
        ),
        ("brake: 1_0:0", ":1: triggers.admission.brake: '1_0:0' input should be a valid integer", "change the value"),
        ("no: 1", ":1: triggers.admission.no: unknown key", "known: brake"),
        ("admission: {}\nx: 1", ":2: triggers.x: unknown key", "known: admission"),
        ("- 1", ":1: holds no mapping", ""),
        (None, "other.yaml cannot be read", "name a YAML file"),
    ],
)
def test_a_wrong_policy_is_refused_as_a_pack_is(tmp_path, text, what, fix):
    """File, line, key, value and the nearest thing that would have been right."""
    file = tmp_path / "other.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PackError) as caught:
        load_policy(file)
    assert caught.value.what.startswith(str(file))
    assert what in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    "source",
    [
        'kind: csv, path: "https://me:hush@example.com/a.csv"',
        'kind: parquet, path: "filecache::https://me:hush@example.com/a.parquet"',
        'kind: sql, url: "postgresql://me:hush@example.com/a", table: a',
        'kind: sql, url: "postgresql://example.com/a?user=me&password=hush", table: a',
    ],
)
def test_a_password_in_a_source_is_refused_and_not_repeated(source, tmp_path):
    """A pack is in git: the fix is a connection, and the message may go into a log."""
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "model.py").write_text("")
    (tmp_path / "wrong" / "pack.yaml").write_text(
        f"description: A model\nowner: me\nsource: {{{source}}}\ndata: {{target: y, event_time: t}}\n"
        'training: {call: "model:train"}\ngate: {primary: {metric: roc_auc}}\n'
    )
    with pytest.raises(PackError, match="holds a password: make an Airflow connection of it") as caught:
        Pack.load(tmp_path / "wrong")
    assert "hush" not in str(caught.value)


HOSTILE = {
    "brackets": "description: " + "[" * 200_000,
    "closed brackets": "description: " + "[" * 2000 + "]" * 2000,
    "braces": "x: " + "{a: " * 5000,
    "dashes": "- " * 5000 + "a",
    "deep blocks": "\n".join(" " * n + "a:" for n in range(3000)),
    "a seed of 5,000 digits": PACK.replace("timeout: 90m", f"seed: {'9' * 5000}"),
    "an instant that overflows": PACK.replace("start: 2013-04-01", "start: '9999-12-31T23:59:59-23:59'"),
    "ten megabytes": PACK + "# " + "x" * 10_000_000,
    "a null character": PACK + "\0",
    "not UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_pack_yaml_stops_what_serves_all_packs(name, tmp_path):
    """However deep, large or strange, it is a PackError that names the file, in a short time and little memory."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "model.py").write_text("")
    content = HOSTILE[name]
    (folder / "pack.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PackError, match=r"pack\.yaml"):
        Pack.load(folder)


@pytest.mark.parametrize("name", ["pack.yaml", "README.md", "model.py", "other.py"])
def test_a_link_in_a_pack_is_refused(name, tmp_path):
    """A link may lead to a secret, and a pipe would never end: neither is opened."""
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "model.py").write_text("")
    (folder / "pack.yaml").write_text(PACK)
    secret = tmp_path / "secret"
    secret.write_text(PACK)
    for make in (lambda: os.mkfifo(folder / name), lambda: (folder / name).symlink_to(secret)):
        (folder / name).unlink(missing_ok=True)
        make()
        with pytest.raises(PackError, match=name.replace(".", r"\.")):
            Pack.load(folder)
