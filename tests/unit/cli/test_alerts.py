"""The commands about alerts, in this process: what they print, what they write down, and what they refuse."""

import asyncio
import json
import re
import shutil
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI
from tests.servers import free_port
from typer.testing import CliRunner

from evergreen import database as db
from evergreen import loop
from evergreen.cli import app
from evergreen.database import HOME
from evergreen.errors import AlertError, PackError, SendersError, SettingsError
from evergreen.laws import scaffold
from evergreen.settings import Settings
from evergreen.triggers import inbox, senders
from evergreen.triggers.inbox import NewAlert
from evergreen.triggers.webhook import make_app

CALM = "{cooldown: 0s, dedupe: 1h}"


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A home with the pack `churn`, whose alerts need not wait; the commands find it."""
    for name, place in {"HOME": tmp_path / "home", "PACKS": tmp_path / "packs"}.items():
        monkeypatch.setenv(f"EVERGREEN_{name}", str(place))
    for name in ("URL", "DATABASE_URL", "SENDERS"):
        monkeypatch.delenv(f"EVERGREEN_{name}", raising=False)
    settings = Settings.from_env()
    scaffold(settings.packs, "churn")
    write_policy(settings, CALM)
    return settings


def write_policy(settings, admission):
    file = settings.packs / "churn" / "pack.yaml"
    text = file.read_text().split("triggers:")[0]
    file.write_text(f"{text}triggers:\n  admission: {admission}\n")


@pytest.fixture
def database(settings):
    return db.connect(settings.database_url)


@pytest.fixture
def ask(settings):
    """What a command prints; what it raises is raised."""

    def said(*words):
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout) if "--json" in words else done.stdout

    return said


def refused(*words):
    """What is said of words that are wrong."""
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 2, done.output
    return " ".join(done.stderr.split())


class Runs:
    """An Airflow that starts what it is asked for, or nothing."""

    def __init__(self, start):
        self.start = start

    def is_paused(self, _pack):
        return False

    def run_exists(self, _pack, _run_id):
        return self.start

    def run_failed(self, _pack, _run_id):
        return False


def tell(database, *reasons, sender="grafana"):
    """Keep alerts with these reasons; return their ids."""
    number = len(database.events(kind="alert"))
    alerts = [NewAlert(sender, f"{number + n}", reason, reason) for n, reason in enumerate(reasons)]
    return inbox.keep(database, "churn", alerts)


def admit(settings):
    """Decide what is due, and start the runs."""
    loop.admit(settings, Runs(start=False))
    loop.confirm(settings, Runs(start=True))


@pytest.fixture
def decided(settings, database):
    """Alerts that became a run, a part of it, and a repeat; and one that nobody has looked at."""
    ids = tell(database, "it drifts", "it fails", "it drifts")
    admit(settings)
    return [*ids, *tell(database, "it is late")]


# evergreen alerts, evergreen decisions


def test_what_was_refused_is_listed(ask, database):
    """By the minute, with who, why and how often; of one pack, or of all, those that are not there among them."""
    one = {"status": 401, "reason": "no signature", "pack": "churn", "sender": None, "address": "10.0.0.7", "times": 9}
    two = {"status": 404, "reason": "no pack 'chrn'", "pack": None, "sender": "ci", "address": None, "times": 1}
    database.append(HOME, "refused", {"since": "2026-01-01T00:00:00+00:00", "refused": [one, two]})
    assert [row["times"] for row in ask("alerts", "--refused", "--json")] == [9, 1]
    assert [row["status"] for row in ask("alerts", "churn", "--refused", "--json")] == [401]
    shown = ask("alerts", "--refused")
    assert "nobody known at 10.0.0.7" in shown
    assert "no pack 'chrn'" in shown
    assert ask("alerts").startswith("no alerts")


ALERT = "alert pack at heard_again last_heard sender reason fingerprint status as_of evidence outcome final rule because run_id until"
DECISION = "at pack alert outcome rule reason until run_id"
LOOK = "now outcome rule reason until run_id"
SIMULATED = "pack since policy was would guessed median_hours differences"


def test_alerts_tell_what_became_of_each(ask, decided):
    """Newest first: outcome, rule, sentence and run; whether that is final; nothing of one that was not looked at."""
    rows = ask("alerts", "churn", "--json")
    assert [row["alert"] for row in rows] == decided[::-1]
    assert [(row["outcome"], row["rule"], row["final"]) for row in rows] == [
        (None, None, False),
        ("drop", "dedupe", True),
        ("merge", "merge", True),
        ("retrain", "retrain", True),
    ]
    run_id = f"alert__{decided[0].removeprefix('alert-')}"
    assert [row["run_id"] for row in rows] == [None, None, run_id, run_id]
    assert "the same complaint as " + decided[0] in rows[1]["because"]
    assert {frozenset(row) for row in rows} == {frozenset(ALERT.split())}


def test_alerts_are_readable_as_text(ask, decided):
    """A line for each: id, when, from whom, why, and what became of it."""
    lines = ask("alerts").splitlines()
    assert lines[0].split() == ["alert", "when", "(UTC)", "pack", "from", "because", "became"]
    first = rf"{decided[0]}  \d{{4}}-\d\d-\d\d \d\d:\d\d  churn  grafana  it drifts   retrain\s*"
    assert re.fullmatch(first, lines[-1])
    assert "not decided yet" in lines[1]
    assert "drop, dedupe" in lines[2]


def test_an_alert_that_was_heard_again_says_how_often_and_when(settings, database, ask, decided):
    """What became of it stays what its run is."""
    with database.writing() as connection:
        connection.execute(
            sa.update(db.events).where(db.events.c.kind == "alert").values(at="2024-01-01T00:00:00+00:00")
        )
    inbox.keep(database, "churn", [NewAlert("grafana", "0", "it drifts", "it drifts")])
    loop.admit(settings, Runs(start=True))
    row = next(row for row in ask("alerts", "--json") if row["alert"] == decided[0])
    last = database.latest(key=decided[0], kind="heard").at
    assert (row["heard_again"], row["last_heard"], row["outcome"]) == (1, last.isoformat(), "retrain")
    lines = ask("alerts").splitlines()
    assert "last heard" in lines[0]
    assert f"2024-01-01 00:00  {last:%Y-%m-%d %H:%M}  churn  grafana  it drifts   retrain" in "\n".join(lines)


def test_an_intent_is_not_shown_as_final(settings, database, ask):
    """Until its run exists, an alert is neither retrained for nor forgotten."""
    tell(database, "it drifts")
    loop.admit(settings, Runs(start=False))
    (row,) = ask("alerts", "--json")
    assert (row["outcome"], row["final"]) == ("retrain", False)
    assert "retrain: its run is asked for" in ask("alerts")
    assert ask("decisions", "--json") == []


def test_decisions_say_why(ask, decided):
    """Newest first; each with its rule, its sentence and the run it names."""
    rows = ask("decisions", "--pack", "churn", "--json")
    assert {frozenset(row) for row in rows} == {frozenset(DECISION.split())}
    assert {(row["alert"], row["outcome"]) for row in rows} == {
        (decided[0], "retrain"),
        (decided[1], "merge"),
        (decided[2], "drop"),
    }
    said = ask("decisions")
    assert re.search(rf"retrain  churn  {decided[0]}  run alert__{decided[0][6:]}\n {{18}}no run answers it yet", said)
    assert f"the same complaint as {decided[0]}" in said


@pytest.mark.parametrize("command", ["alerts", "decisions"])
def test_what_is_listed_can_be_bounded(ask, database, decided, command):
    """`--limit` is how many, `--since` from when: an instant, or so long ago."""
    rows = ask(command, "--json")
    assert ask(command, "--limit", "1", "--json") == rows[:1]
    assert ask(command, "--since", "1h", "--json") == rows
    assert ask(command, "--since", rows[0]["at"], "--json") == rows[:1]
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert ask(command, "--since", later, "--json") == []
    assert "'2x' is not a time" in refused(command, "--since", "2x")
    assert "'99999999d' is longer than a hundred years" in refused(command, "--since", "99999999d")


def test_twenty_are_shown_or_all_since(ask, database):
    """A long history does not flood the terminal; who asks for a time gets all of it."""
    tell(database, *map(str, range(30)))
    assert len(ask("alerts", "--json")) == 20
    assert len(ask("alerts", "--since", "1d", "--json")) == 30


def test_the_alerts_of_a_pack_that_is_gone_stay(settings, database, ask):
    """What was said of a pack is told after its folder was removed; a name that never was is not known."""
    tell(database, "it drifts")
    shutil.rmtree(settings.packs / "churn")
    assert len(ask("alerts", "churn", "--json")) == 1
    with pytest.raises(PackError, match="there is no pack 'chum'"):
        ask("alerts", "chum")


def test_a_reason_is_no_markup(database, ask):
    """What a stranger wrote is shown as it is."""
    tell(database, "[bold]drift[/] in [red]")
    assert "[bold]drift[/] in [red]" in ask("alerts")


# evergreen snooze


def test_a_snooze_holds_until_it_is_over(settings, database, ask):
    """Alerts are held, and say until when, by whom and why; ended by hand, they are decided at the next look."""
    answer = ask("snooze", "churn", "--for", "6h", "--why", "the source is being moved", "--json")
    assert answer.keys() == {"pack", "at", "until", "why", "by"}
    until = datetime.fromisoformat(answer["until"])
    assert until - datetime.fromisoformat(answer["at"]) == pytest.approx(timedelta(hours=6), abs=timedelta(seconds=30))
    tell(database, "it drifts")
    admit(settings)
    (held,) = ask("decisions", "--json")
    assert (held["outcome"], held["rule"], held["until"]) == ("hold", "snooze", answer["until"])
    assert held["reason"].endswith(f"by {answer['by']}: the source is being moved")
    assert f"hold, snooze until {until:%Y-%m-%d %H:%M}" in ask("alerts")
    assert "decided again" in ask("snooze", "churn", "--off")
    admit(settings)
    assert ask("alerts", "--json")[0]["outcome"] == "retrain"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("", "say either --for how long, or --off"),
        ("--for 6h --off --why x", "say either --for how long, or --off"),
        ("--for 6h", "say for how long and why"),
        ("--for 0s --why x", "say for how long and why"),
        ("--for soon --why x", "'soon' is not a duration"),
    ],
)
def test_a_snooze_says_how_long_and_why(settings, database, words, why):
    """Anything else is refused before it is written down."""
    assert why in refused("snooze", "churn", *words.split())
    assert database.events("churn") == []


def test_a_broken_pack_can_be_snoozed(settings, ask, database):
    """It is when a pack is broken that one wants quiet; a pack that is not there is named wrongly."""
    write_policy(settings, "{brake: none}")
    assert "are held until" in ask("snooze", "churn", "--for", "1h", "--why", "it is being mended")
    with pytest.raises(PackError, match="there is no pack 'chun'"):
        ask("snooze", "chun", "--off")


# evergreen simulate


def test_the_policy_in_force_changes_nothing(ask, decided):
    """Replayed as it was, history is what happened."""
    answer = ask("simulate", "churn", "--json")
    assert answer["was"] == answer["would"]
    assert (answer["was"]["alerts"], answer["was"]["runs"], answer["differences"]) == (4, 1, [])
    assert "0 alerts would have gone another way" in ask("simulate", "churn")


def test_another_policy_shows_what_it_would_have_made(ask, decided, tmp_path):
    """Totals beside what was; then each alert that would have gone another way, look by look."""
    (tmp_path / "other.yaml").write_text("{cooldown: 0s, dedupe: 0s}")
    answer = ask("simulate", "churn", "--policy", str(tmp_path / "other.yaml"), "--json")
    assert answer.keys() == {*SIMULATED.split()}
    assert (answer["policy"]["dedupe"], answer["was"]["dropped"], answer["would"]["dropped"]) == ("0s", 1, 0)
    (course,) = answer["differences"]
    assert (course["alert"], course["reason"]) == (decided[2], "it drifts")
    assert [look["outcome"] for look in course["was"]] == ["drop"]
    assert [look["outcome"] for look in course["would"]] == ["merge"]
    assert course["would"][0].keys() == {*LOOK.split()}
    said = ask("simulate", "churn", "--policy", str(tmp_path / "other.yaml"))
    assert re.search(r"4 alerts +as it was +under other.yaml", said)
    assert re.search(r"dropped +1 +0", said)
    assert re.search(rf"{decided[2]}  .*it drifts\n  was .*drop: the same.*\n  would .*merge: ", said)


def test_only_alerts_since_then_are_reported(ask, decided, tmp_path):
    """`--since` chooses what is reported on; what came before it is still the past."""
    (tmp_path / "other.yaml").write_text("dedupe: 0s\ncooldown: 0s")
    newest = ask("alerts", "--json")[0]["at"]
    answer = ask("simulate", "churn", "--policy", str(tmp_path / "other.yaml"), "--since", newest, "--json")
    assert (answer["was"]["alerts"], answer["differences"]) == (1, [])
    assert "no alerts to replay" in ask("simulate", "churn", "--since", "2100-01-01")


def test_a_wrong_policy_ends_before_the_replay(ask, decided, tmp_path):
    """File, line and the nearest right thing."""
    (tmp_path / "other.yaml").write_text("dedupe: 1h\ncooldwn: 0s")
    with pytest.raises(PackError, match=r"other.yaml:2: .*cooldwn: unknown key\n.*did you mean 'cooldown'"):
        ask("simulate", "churn", "--policy", str(tmp_path / "other.yaml"))


# evergreen sender


@pytest.mark.parametrize(("kind", "start"), [("signing", "whsec_"), ("bearer", "")])
def test_a_secret_is_printed_once(settings, ask, kind, start):
    """It alone is on standard output, and in a file for its owner's eyes only; another is made by --rotate."""
    secret = ask("sender", "grafana", f"--{kind}")
    assert re.fullmatch(rf"{start}[\w+/=-]{{32,}}\n", secret)
    assert stat.S_IMODE(settings.senders.stat().st_mode) == 0o600
    with pytest.raises(SendersError, match=f"grafana has a {kind} secret already"):
        ask("sender", "grafana", f"--{kind}")
    answer = ask("sender", "grafana", f"--{kind}", "--rotate", "--json")
    assert (answer.keys(), answer["sender"], answer["kind"]) == ({"sender", "kind", "secret"}, "grafana", kind)
    active = getattr(senders.Senders(settings.senders).now()["grafana"], kind)
    assert active == (answer["secret"], secret.strip())


def test_a_sender_signs_or_bears(settings):
    """One of the two is said."""
    assert "say either --signing or --bearer" in refused("sender", "grafana")
    assert "say either --signing or --bearer" in refused("sender", "grafana", "--signing", "--bearer")


# evergreen metrics


def test_metrics_are_printed(ask, decided):
    """As Prometheus reads them, and as JSON."""
    assert 'evergreen_alerts_total{decision="drop",pack="churn",sender="grafana"} 1.0\n' in ask("metrics")
    rows = ask("metrics", "--json")
    assert {frozenset(row) for row in rows} == {frozenset({"name", "labels", "value"})}
    assert {"name": "evergreen_undecided_alerts", "labels": {"pack": "churn"}, "value": 1} in rows


@pytest.mark.parametrize("address", ["example.com:80", "9464", "127.0.0.1:x", "127.0.0.1:70000"])
def test_metrics_are_served_at_an_address(settings, address):
    """A host that is an address, and a port."""
    assert "write 127.0.0.1:9464" in refused("metrics", "--serve", address)


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "10.0.0.1:80", "[::]:9464"])
def test_metrics_are_served_off_loopback_to_a_token_only(settings, address):
    """Without one nobody is asked who they are, so nobody from elsewhere is let in."""
    assert "say --token-file" in refused("metrics", "--serve", address)


def test_a_token_that_can_be_guessed_is_refused(ask, tmp_path):
    """Of fewer than 32 characters, or in no file."""
    (tmp_path / "token").write_text("secret\n", encoding="utf-8")
    for file, says in (("token", "can be guessed"), ("elsewhere", "cannot be read")):
        with pytest.raises(SettingsError, match=says):
            ask("metrics", "--serve", "127.0.0.1:0", "--token-file", str(tmp_path / file))


# evergreen alert, evergreen data-arrived


@pytest.fixture
def served(settings, monkeypatch):
    """The webhook where Airflow's API server has it, found by EVERGREEN_URL."""
    senders.ensure(settings)
    outer = FastAPI()
    outer.mount("/evergreen", make_app(settings, lambda: None))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(outer, host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    monkeypatch.setenv("EVERGREEN_URL", f"http://127.0.0.1:{port}/")
    yield
    server.should_exit = True
    thread.join()


@pytest.mark.usefixtures("served")
def test_an_alert_is_kept_as_it_was_said(ask, database, tmp_path):
    """Reason, as-of, evidence from a file, fingerprint; from the sender `evergreen`."""
    (tmp_path / "shown.json").write_text('{"psi": 0.31}')
    words = ("--as-of", "2026-11-20", "--evidence", f"@{tmp_path / 'shown.json'}", "--fingerprint", "price")
    answer = ask("alert", "churn", "--reason", "prices moved", *words, "--json")
    (kept,) = database.events("churn", kind="alert")
    assert answer == {"pack": "churn", "alert": kept.key, "alerts": [kept.key]}
    said = ("sender", "reason", "evidence", "fingerprint", "as_of", "status")
    assert [kept.body[name] for name in said] == [
        "evergreen",
        "prices moved",
        {"psi": 0.31},
        "price",
        "2026-11-20T00:00:00+00:00",
        "firing",
    ]


@pytest.mark.usefixtures("served")
def test_the_same_id_is_the_same_alert(ask, database):
    """Said again under its id, an alert gets the first answer; without one, each is a new alert."""
    first = ask("alert", "churn", "--reason", "prices moved", "--id", "ticket-7")
    assert ask("alert", "churn", "--reason", "prices moved", "--id", "ticket-7") == first
    assert re.fullmatch(r"alert-[0-9a-f]{20} is kept\. What becomes of it: evergreen alerts churn\n", first)
    assert ask("alert", "churn", "--reason", "prices moved") != first
    assert len(database.events("churn", kind="alert")) == 2


@pytest.mark.usefixtures("served")
def test_what_the_server_refuses_is_said(ask, settings):
    """The status, the field, and what to do."""
    with pytest.raises(AlertError, match=r"404: there is no pack 'chum'\n  fix: name a pack"):
        ask("alert", "chum", "--reason", "prices moved")
    with pytest.raises(AlertError, match="422: as_of: "):
        ask("alert", "churn", "--reason", "prices moved", "--as-of", "2100-01-01")
    with pytest.raises(AlertError, match="cannot be an alert's id"):
        ask("alert", "churn", "--reason", "prices moved", "--id", "with a space")


def test_without_airflow_there_is_nobody_to_tell(ask, settings, monkeypatch):
    """What to start, and what to set where it runs elsewhere; the same where nobody answers."""
    for words in (("alert", "churn", "--reason", "x"), ("data-arrived", "churn")):
        write_policy(settings, CALM + "\n  on_new_data: true")
        with pytest.raises(SettingsError, match=r"no Airflow runs on .*\n  fix: start it: make up; or .*EVERGREEN_URL"):
            ask(*words)
    monkeypatch.setenv("EVERGREEN_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SendersError, match=r"senders.yaml does not exist\n  fix: "):
        ask("alert", "churn", "--reason", "x")
    senders.ensure(settings)
    with pytest.raises(AlertError, match=r"nobody answers: .*\n  fix: start it: make up"):
        ask("alert", "churn", "--reason", "x")
    with pytest.raises(SettingsError, match=r"nobody answers at .*\n  fix: "):
        ask("data-arrived", "churn")


@pytest.mark.parametrize(
    ("evidence", "why"),
    [
        ("[1]", "is no JSON object"),
        ("{", "cannot be read as JSON"),
        ("@/nowhere.json", "No such file"),
        ('{"a": NaN}', "not JSON compliant"),
        ('{"a": 1e999}', "not JSON compliant"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
    ids=["list", "half", "nowhere", "nan", "infinity", "deep"],
)
def test_evidence_is_a_json_object(settings, evidence, why):
    """What cannot be sent is refused before anything is sent."""
    assert why in refused("alert", "churn", "--reason", "x", "--evidence", evidence)


def test_new_data_of_a_pack_that_does_not_listen_are_refused(ask, settings):
    """The file, what is off in it, and how to turn it on."""
    with pytest.raises(
        PackError, match=r"churn/pack.yaml: triggers.on_new_data is off.*\n  fix: write on_new_data: true"
    ):
        ask("data-arrived", "churn")


# evergreen runs, evergreen why


def test_runs_and_why_show_what_they_answer(ask, database, decided):
    """A run that alerts started shows the reason of the first, and names them all."""
    run_id = f"alert__{decided[0].removeprefix('alert-')}"
    (intent,) = database.events("churn", kind="intent", key=decided[0])
    as_of = "2026-11-20T00:00:00+00:00"
    database.append("churn", "run", {**intent.body["conf"], "as_of": as_of}, run_id=run_id)
    row = ask("runs", "churn", "--json")[0]
    assert (row["reason"], row["alerts"]) == ("grafana: it drifts (and 1 more alert)", decided[:2])
    assert "grafana: it drifts (and 1 more alert)" in ask("runs", "churn")
    assert ask("why", run_id).startswith(
        f"run       as of 2026-11-20T00:00 because grafana: it drifts (and 1 more alert); it answers {decided[0]}, "
    )
