"""One report, three ways: markdown, a page, and what stands beside the version; the same words, names escaped."""

import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest
from tests.browser import CHROMIUM, Browser

from evergreen.evaluation import report
from evergreen.evaluation.report import Data, Look, Report
from evergreen.run import Difference, Estimate, Evaluated, Evaluation, SliceEstimate, Verdict, Window

AS_OF = datetime(2013, 5, 1, tzinfo=UTC)
NASTY = "<img src=x onerror=alert(1)>|*_`"


def evaluation(version, shift, groups):
    metrics = {"roc_auc": 0.69 + shift, "log_loss": 0.5 - shift, "accuracy": 0.8}
    slices = [
        SliceEstimate(by="carrier", group=group, rows=1200, metric="roc_auc", estimate=Estimate(value=0.7 + shift))
        for group in groups
    ]
    return Evaluation(
        model=f"{version}" * 32,
        version=version,
        rows=12836,
        metrics={name: Estimate(value=value, low=value - 0.01, high=value + 0.01) for name, value in metrics.items()},
        slices=(*slices, SliceEstimate(by="carrier", group="rare", rows=3, metric="roc_auc", estimate=None)),
        latency_p95_ms=1.25 + shift,
        size_bytes=210_000,
    )


def made(groups=("AA", NASTY), champion=True, **changes):
    """A version that is better in ROC-AUC, worse in log loss, past chance both; and worse in one slice."""
    differences = [("roc_auc", None, None, 0.011, 0.003, 0.019), ("log_loss", None, None, 0.02, 0.01, 0.03)]
    differences += [("roc_auc", "carrier", group, -0.01 * n, -0.1, 0.1) for n, group in enumerate(groups)]
    evaluated = Evaluated(
        challenger=evaluation(4, 0.0, groups),
        champion=evaluation(3, -0.011, groups) if champion else None,
        differences=tuple(
            Difference(metric=metric, by=by, group=group, rows=9, estimate=Estimate(value=value, low=low, high=high))
            for metric, by, group, value, low, high in (differences if champion else ())
        ),
        confidence=0.95,
        primary="roc_auc",
        holdout=Window(start=AS_OF - timedelta(days=14), end=AS_OF),
    )
    values = {
        "model": "flight_delay",
        "version": 4,
        "description": "Will it be late?",
        "run_id": "manual__1",
        "as_of": AS_OF,
        "reason": f"drift: {NASTY}",
        "verdict": Verdict(decision="review", reasons=("roc_auc 0.690, not shown to be within 0.01", f"{NASTY} hurts")),
        "evaluated": evaluated,
        "data": Data(tag="flight_delay/2013", rows=96000, partitions=111, rows_more=26000, new=30, changed=2, gone=0),
        "look": Look(as_of=AS_OF, kind="shift", reasons=("temperature has moved",)),
        "made_by": {"code": "0123456789ab"},
        "plots": ("roc.png",),
    }
    return Report(**(values | changes))


class Words(HTMLParser):
    """The text of a page; its tags and their attributes."""

    def __init__(self, content):
        super().__init__()
        self.text, self.tags, self.silent = [], [], False
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.silent = tag == "style"

    def handle_endtag(self, _tag):
        self.silent = False

    def handle_data(self, data):
        if not self.silent:
            self.text.append(data)


def rows_of(markdown, name):
    """The cells of the table row that begins with `name`."""
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_compares():
    """Figure, champion's figure, difference and both intervals of each metric; the primary first."""
    text = report.markdown(made())
    assert rows_of(text, "roc_auc") == [
        *("roc_auc", "0.6900", "0.6790", "+0.0110 ▲", "+0.0030 … +0.0190", "0.6800 … 0.7000"),
    ]
    assert text.index("| roc_auc |") < text.index("| accuracy |")


def test_past_chance_means_marked_by_what_is_better():
    """More log loss is worse; a difference whose interval holds zero, or that is not there, is not marked."""
    text = report.markdown(made())
    assert rows_of(text, "log_loss")[3] == "+0.0200 ▼"
    assert rows_of(text, "AA")[4] == "+0.0000"
    assert rows_of(text, "accuracy")[3] == "—"


def test_slices_begin_with_the_worst():
    """The group that lost most comes first; only so many are shown, and the rest counted."""
    groups = [f"g{number:02}" for number in range(20)]
    text = report.markdown(made(groups))
    shown = re.findall(r"^\| (g\d\d) ", text, re.MULTILINE)
    assert shown == [f"g{number:02}" for number in range(19, 19 - report.GROUPS, -1)]
    assert "8 more groups changed less for the worse" in text


def test_a_group_without_a_figure_is_named():
    """Too few rows: said so, and no row of zeros."""
    text = report.markdown(made())
    assert "- Without a figure, for too few rows or one class only: rare" in text
    assert "| rare |" not in text


def test_without_a_champion_nothing_is_compared():
    """The first version: three columns, and no champion's figures."""
    text = report.markdown(made(champion=False))
    assert "without a champion to compare with" in text
    assert len(rows_of(text, "roc_auc")) == 3


def test_what_changed_in_the_data_is_told():
    """Rows and partitions since the champion's snapshot, and the monitor's newest look."""
    text = report.markdown(made())
    for words in (
        "+26 000 rows",
        "30 are new",
        "2 have other rows",
        "as of 2013-05-01: shift",
        "temperature has moved",
    ):
        assert words in text


def test_an_answer_stands_before_the_gates_reasons():
    """Who decided comes first."""
    reasons = next(report.sections(made(answer="promoted by ada: fresher"))).sentences
    assert reasons[0] == "version 4 promoted by ada: fresher"


def test_all_say_the_same():
    """Every sentence and every figure of the sections is on the page and, escaped, in the markdown."""
    found = made()
    page, text = "".join(Words(report.page(found, {})).text), report.markdown(found)
    for section in report.sections(found):
        cells = [cell.text for row in section.rows for cell in row]
        for words in (section.title, *section.sentences, *cells):
            assert words in page
            assert report._plain(words) in text


def test_names_and_reasons_are_data():
    """Markup in a group, a reason or a verdict stays text: on the page, and in markdown, table cells included."""
    page, text = Words(report.page(made(), {"roc.png": b"png"})), report.markdown(made())
    assert "onerror" not in {name for _, attrs in page.tags for name in attrs}
    assert [attrs["src"] for tag, attrs in page.tags if tag == "img"] == ["data:image/png;base64,cG5n"]
    assert "script" not in {tag for tag, _ in page.tags}
    assert "\\<img" in text
    assert not re.search(r"(?<!\\)<img", text)
    (line,) = [line for line in text.splitlines() if line.startswith("| \\<img")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 7


def test_the_page_asks_nothing_of_the_network():
    """Its policy forbids it, and it names no address."""
    page = report.page(made(), {"roc.png": b"png"})
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_same_report_gives_the_same_bytes():
    assert report.page(made(), {"roc.png": b"1"}) == report.page(made(), {"roc.png": b"1"})


def test_the_description_fits_into_mlflow():
    """Cut at a whole part, with where the rest is; the reasons are in it."""
    many = [f"carrier {number} with a long name" for number in range(200)]
    text = report.description(made(many, made_by={f"k{n}": "x" * 60 for n in range(60)}))
    assert len(text) <= report.LONGEST
    assert text.startswith("Will it be late?\n\n### flight_delay version 4: review")
    assert "not shown to be within 0.01" in text
    assert text.endswith("`evergreen report flight_delay@4`")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_browser_shows_the_page_on_a_screen_and_on_a_telephone(tmp_path):
    """Nothing is wider than the window, tables scroll by themselves, nothing is fetched."""
    file = tmp_path / "report.html"
    file.write_text(report.page(made([f"{NASTY}{number}" for number in range(9)]), {}), "utf-8")
    browser = Browser(tmp_path / "chromium")
    try:
        for width in (1280, 400):
            browser.open(file.as_uri(), width)
            assert browser.value("document.documentElement.scrollWidth") <= width
            asked = [each["params"]["request"]["url"] for each in browser.said if "request" in each["params"]]
            assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    finally:
        browser.close()
