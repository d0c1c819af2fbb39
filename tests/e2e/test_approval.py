"""A person's answer on Airflow's own page, given with a real browser: promote, reject, nobody in time, and superseded.

And what a person can ask of the same home: the way back.
"""

import json
import os
import signal
import sqlite3
from contextlib import closing, suppress
from functools import cached_property

import pytest
from tests.browser import CHROMIUM, Browser
from tests.e2e.test_scheduler import PACK as PACK_YAML
from tests.e2e.test_scheduler import TODAY, Home, until, write_pack

from evergreen import database as db
from evergreen import keys, stages
from evergreen.history import history_of
from evergreen.pack import load
from evergreen.registry import ledger
from evergreen.registry.models import Registry
from evergreen.run import slug_of
from evergreen.settings import Settings

pytestmark = [
    pytest.mark.fault,  # two minutes of a browser: too long for make test
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
PACK = "asks"
PRIMARY = "primary: {metric: roc_auc, min: 0.5"
PATIENT = f"promotion: approval\n  {PRIMARY}"
HASTY = f"promotion: approval\n  approval_timeout: 1s\n  {PRIMARY}"


class Asking(Home):
    """A home whose pack wants approval; all but one of its runs are performed here, up to the question."""

    def write(self, gate=PATIENT, number=0):
        """The pack; each number gives another model."""
        folder = self.packs / PACK
        if not folder.exists():
            write_pack(folder)
            model = (folder / "model.py").read_text("utf-8")
            assert model.count(".mean())") == 1
            (folder / "model.py").write_text(
                model.replace(".mean())", ".mean()) + job.params['number'] / 100"), "utf-8"
            )
        text = PACK_YAML.format(schedule="null", wait=f"null, number: {number}")
        assert PRIMARY in text
        (folder / "pack.yaml").write_text(text.replace(PRIMARY, gate), "utf-8")

    @cached_property
    def settings(self):
        return Settings.from_env(self.env)

    @cached_property
    def database(self):
        return db.connect(self.settings.database_url)

    def prepared(self, number, gate=PATIENT):
        """A run up to the version it registers; what is left is its verdict."""
        self.write(gate, number)
        run = keys.begin(
            self.settings, load(self.packs, PACK), f"run {number}", as_of=TODAY, scheduled=TODAY, reason="a test asked"
        )
        ingested = stages.ingest(run)
        validated = stages.validate(run, ingested)
        snapshot = stages.snapshot(run, ingested, validated)
        trained = stages.train(run, snapshot)
        evaluated = stages.evaluate(run, snapshot, trained)
        return run, evaluated, stages.register(run, validated, snapshot, trained, evaluated)

    def ask(self, prepared):
        """The verdict, and the run of the approval DAG, asked for as the training DAG's last task does."""
        promoted = stages.promote(*prepared)
        assert promoted.waits
        run = prepared[0].id
        body = {"logical_date": None, "dag_run_id": approval_of(promoted.version, run), "conf": {"run": run}}
        answer = self.airflow.post(f"/api/v2/dags/{PACK}__approval/dagRuns", json=body)
        assert answer.is_success, answer.text
        return approval_of(promoted.version, run)

    def state(self, approval, task=""):
        path = f"/api/v2/dags/{PACK}__approval/dagRuns/{approval}" + (f"/taskInstances/{task}" if task else "")
        answer = self.airflow.get(path)
        return answer.json()["state"] if answer.is_success else None

    def kill(self, approval, task):
        """The process of the task at work, if this is quick enough to see it."""
        path = f"/api/v2/dags/{PACK}__approval/dagRuns/{approval}/taskInstances/{task}"
        found = until(
            lambda: (now := self.get(path))["state"] == "deferred" or (now["state"] == "running" and now["pid"])
        )
        if found is not True:
            with suppress(ProcessLookupError):
                os.kill(found, signal.SIGKILL)

    def pause(self, paused):
        """The approval DAG, whose tasks then stay where they are."""
        answer = self.airflow.patch(f"/api/v2/dags/{PACK}__approval", json={"is_paused": paused})
        assert answer.is_success, answer.text

    def fail(self, approval, task):
        """The try of a task that has heard its answer and has not gone on yet, as a scheduler would that lost it."""
        with closing(sqlite3.connect(self.folder / "home" / "airflow" / "airflow.db", timeout=60)) as airflow, airflow:
            changed = airflow.execute(
                "UPDATE task_instance SET state = 'up_for_retry', end_date = STRFTIME('%Y-%m-%d %H:%M:%f000', 'now'),"
                " next_method = NULL, next_kwargs = NULL WHERE run_id = ? AND task_id = ? AND state = 'scheduled'",
                (approval, task),
            )
            assert changed.rowcount == 1

    def waits(self, approval):
        """Until the task sleeps and its page has a question."""
        asked = f"/api/v2/dags/{PACK}__approval/dagRuns/{approval}/hitlDetails"
        until(lambda: self.state(approval, "ask") == "deferred" and self.get(asked)["hitl_details"])

    def ended(self, approval):
        return until(lambda: (state := self.state(approval)) in ("success", "failed") and state)

    def go_back(self, why):
        """A run of the rollback DAG, asked for through the REST API, when it has ended."""
        dag = f"/api/v2/dags/{PACK}__rollback"
        until(lambda: self.airflow.get(dag).is_success)
        asked = self.airflow.post(f"{dag}/dagRuns", json={"logical_date": None, "conf": {"why": why}})
        assert asked.is_success, asked.text
        run = f"{dag}/dagRuns/{asked.json()['dag_run_id'].replace('+', '%2B')}"
        return until(lambda: (found := self.get(run))["state"] in ("success", "failed") and found)

    def events(self, run):
        return [event.body for event in self.database.events(PACK, kind="approval", run_id=run)]

    def outcome(self, run):
        return history_of(self.database, run, PACK)["outcome"]


def approval_of(version, run):
    return f"version_{version}__{slug_of(run)}"


class Page(Browser):
    """Airflow's page of a question."""

    def show(self, home, approval, text):
        """Open it, and wait until it shows the text."""
        address = f"http://127.0.0.1:{home.ports[0]}"
        self.open(f"{address}/dags/{PACK}__approval/runs/{approval}/tasks/ask/required_actions", 1400)
        self.until(f"document.body.innerText.includes({json.dumps(text)})")

    def answer(self, choice, comment):
        """Fill the comment in, and press the button."""
        self.until("document.querySelector('textarea')?.focus() || document.activeElement.tagName == 'TEXTAREA'")
        self.ask("Input.insertText", text=comment)
        button = f"[...document.querySelectorAll('button')].find(each => each.innerText.trim() == {json.dumps(choice)})"
        self.until(f"{button} && !{button}.disabled")
        self.value(f"{button}.click()")

    def buttons(self):
        """Whether each answer can still be given."""
        answers = "[...document.querySelectorAll('button')].filter(each => ['promote', 'reject'].includes(each.innerText.trim()))"
        self.until(f"{answers}.length == 2")
        return self.value(f"{answers}.map(each => !each.disabled)")


def superseded(home, page, prepared):
    """A question whose first process is killed, and which is open when a newer challenger comes."""
    home.write(number=3)
    overtaken = home.ask(prepared)
    home.kill(overtaken, "ask")
    home.waits(overtaken)
    page.show(home, overtaken, f"{PACK} version 3: promote")
    home.write(number=4)
    conf = {"as_of": f"{TODAY:%Y-%m-%d}", "reason": "a newer one"}
    asked = home.airflow.post(f"/api/v2/dags/{PACK}__train/dagRuns", json={"logical_date": None, "conf": conf})
    ended = home.ended(overtaken)
    page.show(home, overtaken, f"{PACK} version 3: promote")
    return {
        "newest": asked.json()["dag_run_id"],
        "overtaken": ended,
        "overtaken ask": home.state(overtaken, "ask"),
        "overtaken comment": page.until("document.querySelector('textarea')?.value"),
        "overtaken buttons": page.buttons(),
    }


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """All that happens, once; the tests below say what came of it."""
    home = Asking(tmp_path_factory.mktemp("approval"))
    told = {"home": home}
    home.write()
    up = home.begin("up")
    try:
        first, second, third = (home.prepared(number) for number in (1, 2, 3))
        up.communicate()
        page = Page(tmp_path_factory.mktemp("chromium"))
        until(lambda: home.airflow.get(f"/api/v2/dags/{PACK}__approval").is_success)

        rejected = home.ask(first)
        home.waits(rejected)
        page.show(home, rejected, f"{PACK} version 1: promote")
        told["text"] = page.value("document.body.innerText")
        page.answer("reject", "not on a Friday")
        told["rejected"] = home.ended(rejected)
        report = f"http://127.0.0.1:{home.ports[0]}/evergreen/report/{PACK}/1"
        page.open(report, 1400)
        told["report"] = page.value("document.body.innerText")
        told["plots"] = page.value("[...document.images].filter(each => each.naturalWidth > 100).length")

        home.write(HASTY, 2)
        timed_out = home.ask(second)
        told["timed out"] = home.ended(timed_out)
        page.show(home, timed_out, f"{PACK} version 2: promote")
        told["timed out buttons"] = page.buttons()

        told |= superseded(home, page, third)

        promoted = approval_of(4, told["newest"])
        home.waits(promoted)
        page.show(home, promoted, f"{PACK} version 4: promote")
        home.pause(True)
        page.answer("promote", "it is fresher")
        until(lambda: home.state(promoted, "ask") == "scheduled")
        home.fail(promoted, "ask")
        home.pause(False)
        told["promoted"] = home.ended(promoted)
        until(lambda: home.dag_runs(PACK)[0]["state"] == "success")
        page.close()

        told["fifth"], told["back"] = stages.promote(*home.prepared(5, PRIMARY)), home.go_back("the fifth asks nobody")
        yield told
    finally:
        home.evergreen("down")


def test_the_page_shows_the_report(story):
    """Verdict with its reasons, figures, data and lineage, as text and tables, with the comment and the two answers."""
    for words in ("no champion to compare with", "roc_auc", "Figures", "Lineage", "a test asked", "Comment", "promote"):
        assert words in story["text"]
    assert "|---" not in story["text"], "tables are tables"


def test_the_page_leads_to_the_report_with_plots(story):
    """With what was answered since, and the plots in it."""
    assert "With plots" in story["text"]
    assert "not on a Friday" in story["report"]
    assert story["plots"] == 4


def test_a_person_rejects(story):
    """Written down with person and comment; the version stays out, the run counts as rejected."""
    home = story["home"]
    asked, answered = home.events("run 1")
    assert story["rejected"] == "success"
    assert (asked["status"], answered["status"], answered["choice"]) == ("asked", "answered", "reject")
    assert (answered["comment"], answered["through"]) == ("not on a Friday", "Airflow")
    assert answered["person"]
    assert home.outcome("run 1") == "rejected"


def test_nobody_answers_in_time(story):
    """The time-out rejects, and says that it was nobody."""
    _, answered = story["home"].events("run 2")
    assert story["timed out"] == "success"
    assert (answered["choice"], answered["person"]) == ("reject", None)
    assert story["timed out buttons"] == [False, False]
    assert story["home"].outcome("run 2") == "rejected"


def test_a_newer_challenger_supersedes(story):
    """The older question ends at once, skipped, and its page says which version is newer.

    Though the process that was to ask it was killed before it had: the next try did.
    """
    _, ended = story["home"].events("run 3")
    assert (story["overtaken"], story["overtaken ask"]) == ("success", "skipped")
    assert story["overtaken comment"] == "superseded: version 4 is newer, and waits for approval"
    assert story["overtaken buttons"] == [False, False]
    assert (ended["status"], ended["why"]) == ("superseded", "version 4 is newer, and waits for approval")
    assert story["home"].outcome("run 3") == "superseded"


def test_a_person_promotes_what_the_training_dag_asked_for(story):
    """The training run ends while the question is open; the answer makes the version champion, alias and events alike.

    Even where Airflow fails the try of the task that was answered, and starts another: nobody is asked twice.
    """
    home = story["home"]
    _, answered = home.events(story["newest"])
    assert story["promoted"] == "success"
    assert (answered["choice"], answered["comment"]) == ("promote", "it is fresher")
    assert home.outcome(story["newest"]) == "promoted"
    registry = Registry(home.settings)
    champion = registry.champion(PACK)
    assert (champion.version, champion.aliases) == (4, ("champion",))
    moves = [event.body["status"] for event in home.database.events(PACK, kind="promotion", run_id=story["newest"])]
    assert moves == ["intended", "done"]
    assert home.database.first_bad(PACK) is None
    assert "promoted by" in registry.lineage(PACK, 4)["verdict"]["reasons"][0]


def test_a_person_goes_back_by_the_rollback_dag(story):
    """A scheduler runs it: the alias is back, and the ledger names the person who asked, and the reason."""
    home, run = story["home"], story["back"]
    assert (story["fifth"].champion, story["fifth"].previous, run["state"]) == (5, 4, "success")
    assert Registry(home.settings).champion(PACK).version == 4
    last = ledger.reigns(home.database, PACK)[-1]
    assert (last.version, last.by, last.run_id) == (4, "rollback", run["dag_run_id"])
    assert run["triggering_user_name"]
    assert (last.who, last.why) == (run["triggering_user_name"], "the fifth asks nobody")
    shown = home.evergreen("history", PACK, "--json")[0]
    assert (shown["version"], shown["who"], shown["why"]) == (4, last.who, last.why)
