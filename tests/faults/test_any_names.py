"""The chain and the monitor on columns of hostile names: every figure is that of the same rows with plain names.

The names are those that the project, or a library under it, uses for something of its own; patterns, markup and
mathematics; names that are hardly any, and names that differ in case alone.
"""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.faults.conftest import AS_OF, DAYS, FIRST, LATER, MORE, NAME, SCHEDULED, Home, perform_stage
from typer.testing import CliRunner

from evergreen import keys, reports
from evergreen.cli import app
from evergreen.data.store import Store
from evergreen.evaluation.report import markdown
from evergreen.evaluation.report import page as report_page
from evergreen.laws import check_pack
from evergreen.looks import PROFILE, REFERENCE, Reference
from evergreen.loop.monitor import alert_of, monitor
from evergreen.monitoring.profiles import Profile
from evergreen.stages import scoring
from evergreen.triggers.messages import Message

pytestmark = [pytest.mark.slow, pytest.mark.fault]

TARGET, EVENT_TIME, GROUP, GATED, CHECKED = "^t.*$", "*", "rows", "<b>by</b>", "failed_expectations"
STRONG, WEAK, TEXT = "prediction", "$\\frac{", "count"
FEATURES = [
    *(STRONG, WEAK, TEXT, GROUP, GATED, CHECKED, "failed_expectations_", "predictions", "prediction_0", "len", "index"),
    *("level_0", "__index_level_0__", "literal", "name", "word", "value", "held", "number", "part", "place", "text"),
    *(
        "self",
        "columns",
        "evergreen place",
        "evergreen dealt by",
        "^.*$",
        "^c",
        "x$",
        "t1",
        "target",
        "a.b",
        "a/b",
        "a\\b",
    ),
    *(
        'quo"te',
        "apo'strophe",
        "back`tick",
        "line\nbreak",
        "tab\there",
        "bell\x07",
        "{}",
        "{0}",
        "%s",
        "[red]x[/red]",
        "[/]",
    ),
    *(
        "&amp;",
        " ",
        " lead",
        "Case",
        "case",
        "CASE",
        "café",
        "列",
        "😀",
        "x" * 300,
        "; ",
        "null",
        "rows_",
        "performance",
    ),
]
PLAIN = {name: f"c{place:02}" for place, name in enumerate(sorted([*FEATURES, TARGET, EVENT_TIME]))}
"""Hostile name → plain one, in the same order: the trainer draws its weights in the order of the columns."""
MODEL = """
from evergreen.training import tabular

def train(data, job):
    tabular.train(data, job)
"""


def day(number: int) -> pl.DataFrame:
    """The rows of a day: features of every type; in the last days what the predictions hang on has moved."""
    rng = np.random.default_rng(number)
    rows, columns = 80, {}
    for place, name in enumerate(FEATURES):
        kinds = (
            rng.normal(size=rows).round(4),
            rng.integers(0, 9, rows),
            rng.choice(["north", "south", "west"], rows),
            rng.random(rows) < 0.5,
            np.where(rng.random(rows) < 0.2, None, rng.normal(size=rows).round(3)),
        )
        columns[name] = pl.Series(name, kinds[place % len(kinds)].tolist(), strict=False)
    moved = 1.5 * (number >= DAYS + MORE - 6)
    columns[STRONG] = pl.Series(STRONG, (500 + 100 * (rng.normal(size=rows) + moved)).round())
    columns[WEAK] = pl.Series(WEAK, rng.normal(size=rows).round(4))
    for name in (TEXT, GROUP, GATED, CHECKED):
        columns[name] = pl.Series(name, rng.choice(["north", "south"], rows).tolist())
    if number == 5:
        columns[CHECKED] = pl.Series(CHECKED, [None, *columns[CHECKED][1:]])
    odds = (columns[STRONG] - 500) / 100 + 0.6 * columns[WEAK] + (columns[TEXT] == "north").cast(pl.Float64) - 0.5
    columns[TARGET] = (odds.to_numpy() + rng.normal(size=rows) > 0).astype("int64")
    start = FIRST + timedelta(days=number)
    columns[EVENT_TIME] = [start + timedelta(seconds=86400 * n // rows) for n in range(rows)]
    return pl.DataFrame(columns)


class Named:
    """A home whose columns are called by `names`, after a run and a look."""

    def __init__(self, root: Path, names: dict[str, str]) -> None:
        self.names = names
        self.back = {new: old for old, new in names.items()}
        self.home = Home.at(root)
        self.home.rows.mkdir(parents=True)
        for number in range(DAYS + MORE):
            rows = day(number)
            rows.columns = [names[name] for name in rows.columns]
            rows.write_parquet(self.home.file(number))
        column = {name: {"column": names[name]} for name in (CHECKED, STRONG, TEXT)}
        self.home.write(
            data={"target": names[TARGET], "event_time": names[EVENT_TIME], "quarantine": 0.1},
            expectations=[
                {"expect_column_values_to_not_be_null": column[CHECKED]},
                {"expect_column_values_to_be_between": column[STRONG] | {"min_value": 250, "mostly": 0.9}},
                {"expect_column_values_to_be_in_set": column[TEXT] | {"value_set": ["north", "south"]}},
                {"expect_column_mean_to_be_between": column[STRONG] | {"min_value": 100, "max_value": 900}},
                {"expect_column_pair_values_to_be_equal": {"column_A": names["Case"], "column_B": names["Case"]}},
            ],
            training={"params": {"epochs": 3, "batch_size": 128, "learning_rate": 0.02, "hidden": [8], "members": 2}},
            gate={
                "primary": {"metric": "roc_auc", "min": 0.5, "margin": 0.2},
                "slices": [{"by": names[GROUP], "metric": "roc_auc", "min_rows": 10}],
                "fairness": [{"by": names[GATED], "max": 1, "min_rows": 10}],
            },
            triggers={"drift": {"window": "3d", "violated": "1 of 1", "freshness": {"gain": 0.5}}},
        )
        pack = self.home.folder / "pack.yaml"
        assert "steps" not in pack.read_text()
        (self.home.folder / "model.py").write_text(MODEL)
        self.run = self.home.perform("first", as_of=AS_OF)
        self.watched = self.look()

    def look(self) -> Any:
        run = keys.begin(
            self.home.settings, self.home.pack, "look", as_of=LATER, scheduled=SCHEDULED, reason="a test", kind="watch"
        )
        values: dict[str, Any] = {}
        for stage in ("ingest", "validate"):
            perform_stage(run, stage, values)
        return monitor(run, values["ingest"], values["validate"])

    @property
    def store(self) -> Store:
        return Store(self.home.settings)

    def figures(self, content: Any) -> Any:
        """`content`, JSON, with names of columns as they are in `day`, and without sentences, hashes and times it took."""
        if isinstance(content, dict):
            left_out = ("sentence", "reasons", "model", "predictions", "plots", "latency_p95_ms", "size_bytes")
            kept = {self.back.get(key, key): self.figures(each) for key, each in content.items() if key not in left_out}
            return kept | (
                {"moved": self.figures(content["predictions"])} if "role" in str(content.get("predictions")) else {}
            )
        if isinstance(content, list):
            return [self.figures(each) for each in content]
        return self.back.get(content, content) if isinstance(content, str) else content


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Named, Named]:
    """The same data and pack, by hostile names and by plain ones."""
    hostile = Named(tmp_path_factory.mktemp("hostile"), {name: name for name in PLAIN})
    return hostile, Named(tmp_path_factory.mktemp("plain"), PLAIN)


def test_rows_set_aside_are_the_same(both):
    """With all their columns, one called as that of the failed expectations is among them."""
    frames = []
    for each in both:
        validated = each.run["validate"]
        assert validated.rows_quarantined == 1
        frames.append(pl.read_parquet(each.store.path(validated.quarantine)))
    assert len(frames[0].columns) == len(frames[1].columns) == len(FEATURES) + 3
    assert frames[0].columns[-1] == "failed_expectations__"
    assert frames[0][CHECKED].to_list() == frames[1][PLAIN[CHECKED]].to_list() == [None]
    assert [frame[frame.columns[-1]][0].split(" (")[0] for frame in frames] == [
        "expectations.0 expect_column_values_to_not_be_null"
    ] * 2


def test_predictions_and_every_figure_of_the_evaluation_are_the_same(both):
    """Metrics, slices, fairness, importance, and the verdict."""
    hostile, plain = both
    arrays = [pl.read_parquet(each.store.path(each.run["evaluate"].challenger.predictions)).to_numpy() for each in both]
    assert np.array_equal(*arrays)
    found = [each.figures(each.run["evaluate"].model_dump(mode="json")) for each in both]
    assert found[0] == found[1]
    assert found[0]["importance"][0]["column"] == STRONG
    assert len(found[0]["importance"]) == len(FEATURES)
    assert hostile.run["promote"].verdict.decision == plain.run["promote"].verdict.decision == "promote"


def test_what_the_champion_is_compared_with_is_the_same(both):
    """The profile has a column called `prediction`, and the predictions beside it."""
    profiles, references = [], []
    for each in both:
        profile = Profile.from_bytes(each.home.registry.artifact(NAME, 1, PROFILE))
        columns = {each.back[name]: column for name, column in profile.columns.items()}
        profiles.append((columns, profile.predictions))
        about = Reference.model_validate_json(each.home.registry.artifact(NAME, 1, REFERENCE))
        references.append(each.figures(about.model_dump(mode="json")))
    assert references[0] == references[1]
    assert set(profiles[0][0]) == set(PLAIN)
    for name, column in (*profiles[0][0].items(), (None, profiles[0][1])):
        other = profiles[1][1] if name is None else profiles[1][0][name]
        assert (column.rows, column.names, column.mean) == (other.rows, other.names, other.mean), name
        assert np.array_equal(column.values, other.values), name
    assert profiles[0][0][STRONG].minimum > 1 > profiles[0][1].maximum


def test_what_the_monitor_measures_is_the_same(both):
    """Drift of columns and predictions, importance, what newer rows are worth, and what follows."""
    hostile, plain = both
    measured = [each.figures(each.store.read_json(each.watched.report)) for each in both]
    assert measured[0]["windows"] == measured[1]["windows"]
    newest = measured[0]["windows"][-1]
    assert newest["importance"] is not None
    assert newest["moved"]["psi"] > 0
    assert (hostile.watched.kind, hostile.watched.model) == (plain.watched.kind, plain.watched.model)
    assert {PLAIN[name] for name in hostile.watched.columns} == set(plain.watched.columns)
    assert {PLAIN[name]: psi for name, psi in hostile.watched.scores.items()} == plain.watched.scores
    assert hostile.watched.prediction_score == plain.watched.prediction_score > 0
    assert hostile.watched.freshness == plain.watched.freshness


def test_an_alert_of_hostile_names_is_a_message(both):
    """It passes what the webhook checks; nothing in it is a control character."""
    watched = both[0].watched.model_copy(update={"kind": "shift"})
    _, message = alert_of(watched)
    Message.model_validate(message)
    assert "\\x07" not in json.dumps(message, ensure_ascii=False) or "\x07" not in str(message)
    assert not any(ord(character) < 32 and character not in "\n\t" for character in str(message))


class Closed(HTMLParser):
    """Scripts and elements that were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002
        self.found.append(tag)


def test_pages_reports_and_the_terminal_show_them_as_they_are(both):
    """No name is taken for markup; the terminal shows it."""
    hostile = both[0]
    for one in (
        lambda each: each.store.read_bytes(each.watched.page).decode(),
        lambda each: report_page(reports.of_version(each.home.settings, NAME, 1, ""), {}),
    ):
        pages = [Closed(one(each)) for each in both]
        assert set(pages[0].found) == set(pages[1].found)
        assert "b" not in pages[0].found
    assert "rows" in markdown(reports.of_version(hostile.home.settings, NAME, 1, ""))
    env = {"EVERGREEN_HOME": str(hostile.home.settings.home), "EVERGREEN_PACKS": str(hostile.home.settings.packs)}
    shown = CliRunner().invoke(app, ["drift", NAME, "--as-of", f"{LATER:%Y-%m-%d}"], env=env)
    assert shown.exit_code == 0, shown.output
    assert "[red]x[/red]" in shown.output


def test_predictions_of_a_file_are_the_same(both, tmp_path):
    """For raw rows in Parquet and in CSV."""
    for suffix in ("parquet", "csv"):
        found = []
        for each in both:
            rows = pl.read_parquet(each.home.file(3))
            file = tmp_path / f"rows.{suffix}"
            rows.write_parquet(file) if suffix == "parquet" else rows.write_csv(file)
            found.append(scoring.predict(each.home.settings, each.home.champion, file)["prediction"].to_list())
        assert found[0] == found[1]


def test_the_pack_keeps_the_laws(both, tmp_path):
    """`evergreen check` holds it to all of them."""
    home = both[0].home
    laws = list(check_pack(home.settings, home.pack, tmp_path, AS_OF))
    assert all(law.holds for law in laws), laws
    assert len(laws) == 6
    shutil.rmtree(tmp_path, ignore_errors=True)
