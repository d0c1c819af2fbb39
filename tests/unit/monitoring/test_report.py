"""The report holds what was measured; the page shows it, escapes it, and asks nothing of the network."""

import json
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
from tests.browser import CHROMIUM, Browser

from evergreen.monitoring import report
from evergreen.monitoring.drift import Performance, Triage, compare, triage
from evergreen.monitoring.profiles import profile
from evergreen.pack import Data, DriftRules
from evergreen.run import Estimate, Importance

RULES = DriftRules()
DATA = Data(target="late", event_time="at")
START = datetime(2024, 1, 1, tzinfo=UTC)
WEEK = timedelta(days=7)
NASTY = "<img src=x onerror=alert(1)>&\"'"


def rows(number: int, n: int = 400, moved: float = 0.0) -> pl.DataFrame:
    """A week of every kind of column, one of them with a name and a value that want to be markup."""
    rng = np.random.default_rng(number)
    start = START + number * WEEK
    return pl.DataFrame(
        {
            "at": [start + WEEK * (each / n) for each in range(n)],
            "distance": rng.lognormal(6, 0.5, n) + 600 * moved,
            "stops": rng.integers(0, 4, n),
            NASTY: rng.choice(["a", NASTY, "", "a_very_long_name_of_something"], n),
            "code": [f"n{each}" for each in rng.integers(0, 10**6, n)],
            "new": rng.random(n) < 0.5,
            "a_name_without_an_end_" * 4: rng.random(n),
            "empty": pl.Series([None] * n, dtype=pl.Float64),
            "prediction": rng.random(n),
            "late": rng.random(n) < 0.3 + 0.3 * moved,
        }
    )


@pytest.fixture(scope="module")
def told():
    """Five weeks beside four: what the page is made of. In the last two, distances are longer and the model worse."""
    reference = profile(pl.concat([rows(number) for number in range(4)]), START, START + 4 * WEEK)
    history, window = [], None
    for number in range(4, 9):
        moved = float(number >= 7)
        window = profile(rows(number, moved=moved), START + number * WEEK, START + (number + 1) * WEEK)
        figure = Estimate(value=0.8 - 0.1 * moved, low=0.78 - 0.1 * moved, high=0.82 - 0.1 * moved)
        performance = Performance(metric="roc_auc", reference=Estimate(value=0.8, low=0.79, high=0.81), window=figure)
        leans = tuple(
            [
                Importance(column=name, loss=Estimate(value=share), share=share, share_error=0.02)
                for name, share in shares.items()
            ]
            for shares in ({"distance": 0.8, "stops": 0.2}, {"distance": 0.8 - 0.9 * moved, "stops": 0.2 + 0.7 * moved})
        )
        history.append(compare(reference, window, RULES, DATA, performance=performance, importance=leans))
    return triage(history, RULES), history, reference, window


@pytest.fixture(scope="module")
def page(told) -> str:
    found, history, reference, window = told
    return report.page("flights", found, history, RULES, reference, window)


class Reader(HTMLParser):
    """The page's elements and text; an element that is never closed, or closed twice, is a mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def test_json_holds_what_was_decided_and_every_window(told):
    """As it was measured, oldest first."""
    found, history, *_ = told
    content = json.loads(report.to_json("flights", found, history))
    assert (content["format"], content["pack"], content["kind"], content["action"]) == (1, "flights", "shift", "alert")
    assert content["reasons"] == list(found.reasons)
    assert content["windows"] == [each.model_dump(mode="json") for each in history]


def test_the_page_says_what_was_decided_why_and_of_every_column_how_it_lies(told, page):
    """Kind, action, every reason, every column's name."""
    found, history, *_ = told
    reader = read(page)
    assert reader.open == []
    for said in (found.kind, found.action, *found.reasons, *(each.name for each in history[-1].columns)):
        assert said in reader.text, said
    assert sum(tag == "article" for tag, _ in reader.found) == len(history[-1].columns)
    assert sum(tag == "li" and "title" in given for tag, given in reader.found) == len(history)


def test_the_page_says_what_the_champion_leans_on(page):
    """How far it moved, and each column's share; one below zero has its figure and no bar."""
    text = read(page).text
    assert "moved by 0.78 of 1, the pack allows 0.2, chance leaves up to 0.0" in text
    assert "-10.0%" in text
    assert 'width="-' not in page


def test_what_is_violated_comes_before_what_is_not(page):
    """A reader need not look for it."""
    assert page.index("<h3>distance") < page.index("Not moved") < page.index("<h3>stops")


def test_names_and_values_are_text_wherever_they_stand(told):
    """No element and no attribute comes from the data: not from columns, categories, reasons, or the pack's name."""
    found, history, reference, window = told
    reasons = Triage(kind=found.kind, reasons=(NASTY,), evidence={})
    plain, nasty = (read(report.page(name, reasons, history, RULES, reference, window)) for name in ("flights", NASTY))
    assert [tag for tag, _ in nasty.found] == [tag for tag, _ in plain.found]
    assert not {"img", "script"} & {tag for tag, _ in nasty.found}
    names = {name for _, given in nasty.found for name in given}
    assert not [name for name in names if name.startswith("on") or not re.fullmatch(r"[a-z-]+", name)]
    assert nasty.text.count(NASTY) > plain.text.count(NASTY) > 2


def test_the_same_values_give_the_same_page(told, page):
    """No clock and no chance in it: it can be named by its hash."""
    found, history, reference, window = told
    assert report.page("flights", found, history, RULES, reference, window) == page


def test_the_page_names_no_other_place(page):
    """Not even where nothing would be fetched."""
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    assert "default-src 'none'" in page


def test_a_window_without_rows_has_a_page(told):
    """A source that stopped is what somebody will look at."""
    _, history, reference, _ = told
    empty = profile(rows(9).head(0), START + 9 * WEEK, START + 10 * WEEK)
    history = [*history, compare(reference, empty, RULES, DATA)]
    found = triage(history, RULES)
    reader = read(report.page("flights", found, history, RULES, reference, empty))
    assert found.kind == "data fault"
    assert "0 rows" in reader.text


def test_a_year_that_pythons_clock_has_not_has_a_page(told):
    """As other systems' marks for never have."""
    never = pl.Series([253_402_300_800_000_000 + 10**15] * 3).cast(pl.Datetime("us", "UTC"))
    reference = profile(pl.DataFrame({"until": [START] * 60}), START, START + 4 * WEEK)
    window = profile(pl.DataFrame({"until": never}), START + 4 * WEEK, START + 5 * WEEK)
    drift = compare(reference, window, RULES, DATA)
    made = report.page("flights", told[0], [drift], RULES, reference, window)
    assert "2024-01-01 00:00 … 2024-01-01 00:00 → 10031-09-09 01:46 … 10031-09-09 01:46" in made


def test_a_column_of_another_type_has_a_page(told):
    """Numbers beside words."""
    _, _, reference, _ = told
    window = profile(rows(4).with_columns(pl.col("stops").cast(pl.String)), START + 4 * WEEK, START + 5 * WEEK)
    history = [compare(reference, window, RULES, DATA)]
    assert read(report.page("flights", triage(history, RULES), history, RULES, reference, window)).open == []


def test_a_long_history_is_cut_on_the_page(told):
    """Its newest windows are shown."""
    found, history, reference, window = told
    reader = read(report.page("flights", found, history * 30, RULES, reference, window))
    assert sum(tag == "li" and "title" in given for tag, given in reader.found) == report.WINDOWS


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page_without_a_request_or_a_complaint(page, browser, tmp_path, width):
    """At the width of a screen and of a telephone nothing is wider than the page, and its letters can be read."""
    file = tmp_path / "drift.html"
    file.write_text(page)
    browser.open(file.as_uri(), width)
    requests = [
        each["params"]["request"]["url"] for each in browser.said if each["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [each for each in browser.said if each["method"] in complaints] == []
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    assert browser.value(smallest) >= 10
    wide = (
        "[...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert browser.value(wide) == 0


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_the_page_is_light_or_dark_as_its_reader_likes(page, browser, tmp_path):
    """By what the browser says of its reader's preference."""
    file = tmp_path / "drift.html"
    file.write_text(page)
    browser.open(file.as_uri(), 1280)
    shades = []
    for preference in ("light", "dark"):
        browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": preference}])
        shades.append(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert shades == ["rgb(255, 255, 255)", "rgb(11, 18, 32)"]
