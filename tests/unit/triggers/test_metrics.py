"""The metrics: what they count, that they count it once, and that Prometheus can read them."""

import contextlib
import math
import re
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import start_http_server
from prometheus_client.parser import text_string_to_metric_families

from evergreen import database as db
from evergreen.monitoring.drift import ACTIONS
from evergreen.settings import Settings
from evergreen.triggers import metrics
from evergreen.triggers.admission import Decision
from evergreen.triggers.inbox import NewAlert, Ruling, finish, keep, record

NOW = datetime.now(UTC)


@pytest.fixture
def settings(tmp_path):
    return Settings.from_env({"EVERGREEN_HOME": str(tmp_path), "EVERGREEN_PACKS": str(tmp_path / "packs")})


@pytest.fixture
def database(settings):
    return db.connect(settings.database_url)


@pytest.fixture(autouse=True)
def forget():
    """Each test is a process of its own."""
    metrics.registry.cache_clear()


def write_pack(settings, name, admission="{}"):
    """A pack as far as a scrape looks at it."""
    folder = settings.packs / name
    folder.mkdir(parents=True)
    (folder / "model.py").write_text("")
    (folder / "pack.yaml").write_text(
        "description: Does it rain?\nowner: me@example.com\nsource: {kind: csv, path: rows.csv}\n"
        "data: {target: rain, event_time: at}\ntraining: {call: 'model:train'}\n"
        f"gate: {{primary: {{metric: roc_auc}}}}\ntriggers: {{admission: {admission}}}\n"
    )


def tell(database, *senders, pack="more"):
    """Keep an alert of each sender; return their ids."""
    count = len(database.events(pack, kind="alert"))
    alerts = [NewAlert(sender, f"{count + n}", "it drifts", f"{count + n}") for n, sender in enumerate(senders)]
    return keep(database, pack, alerts)


def decide(database, alert, outcome, *, pack="more", intent=False, now=NOW):
    until = now + timedelta(hours=1) if outcome == "hold" else None
    run_id = f"run of {alert}" if outcome in ("retrain", "merge") else None
    decision = Decision(alert, outcome, "rule", "because", until, run_id)
    ruling = Ruling(decision, {"alert": {}}, {"as_of": None} if intent else None)
    assert record(database, pack, [ruling], policy={}, now=now, after=database.latest(pack).position)


def train(database, seconds, device="cpu", run="one", **figures):
    value = {"duration_s": seconds, "hardware": {"device": device}, "metrics": figures}
    return database.append("more", "stage", {"stage": "train", "value": value}, run_id=run)


def samples(settings):
    """What a scrape says: every sample by its name and the values of its labels."""
    families = text_string_to_metric_families(metrics.exposition(settings).decode())
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def alerts_of(settings):
    """`evergreen_alerts_total` by decision, pack and sender."""
    return {key[1:]: value for key, value in samples(settings).items() if key[0] == "evergreen_alerts_total"}


def test_alerts_count_by_sender_and_final_decision(settings, database):
    """An alert counts once, when its decision is final; holds and intents leave it undecided."""
    alerts = tell(database, "grafana", "grafana", "data", "grafana")
    decide(database, alerts[0], "hold")
    decide(database, alerts[2], "retrain", intent=True)
    assert alerts_of(settings) == {}
    assert samples(settings)["evergreen_undecided_alerts", "more"] == 4
    decide(database, alerts[0], "drop")
    decide(database, alerts[1], "drop")
    finish(database, "more", {f"run of {alerts[2]}"})
    assert alerts_of(settings) == {("drop", "more", "grafana"): 2, ("retrain", "more", "data"): 1}
    assert samples(settings)["evergreen_undecided_alerts", "more"] == 1


def test_a_new_process_counts_the_same(settings, database):
    """After a restart the counters are where they were: Prometheus sees no reset, and nothing twice."""
    for alert in tell(database, *["grafana"] * 7):
        decide(database, alert, "drop")
    before = samples(settings)
    metrics.registry.cache_clear()
    assert samples(settings) == before
    assert alerts_of(settings) == {("drop", "more", "grafana"): 7}


def test_a_scrape_reads_only_what_is_new(settings, database, monkeypatch):
    """The second scrape reads the events since the first, in parts where they are many."""
    monkeypatch.setattr(metrics, "AT_ONCE", 3)
    read = []
    monkeypatch.setattr(metrics, "event_of", lambda row, event_of=metrics.event_of: read.append(row) or event_of(row))
    for alert in tell(database, *["grafana"] * 5):
        decide(database, alert, "drop")
    assert alerts_of(settings) == {("drop", "more", "grafana"): 5}
    assert len(read) == 10
    tell(database, "data")
    assert samples(settings)["evergreen_undecided_alerts", "more"] == 1
    assert len(read) == 11


def test_scrapes_at_once_count_once(settings, database, monkeypatch):
    """Two scrapes of one process at the same instant: the second waits for what the first reads."""
    for alert in tell(database, *["grafana"] * 5):
        decide(database, alert, "drop")
    both = threading.Barrier(2)

    def meet(row, event_of=metrics.event_of):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)  # nobody comes, unless both read at once
        return event_of(row)

    monkeypatch.setattr(metrics, "event_of", meet)
    with ThreadPoolExecutor(2) as pool:
        scrapes = [pool.submit(metrics.exposition, settings) for _ in range(2)]
    assert [scrape.exception() for scrape in scrapes] == [None, None]
    assert alerts_of(settings) == {("drop", "more", "grafana"): 5}


def test_latency_ends_with_the_first_decision(settings, database):
    """From kept to first decided, be it a hold or an intent; what comes after it adds nothing."""
    alerts = tell(database, "grafana", "data", "data")
    decide(database, alerts[0], "hold")
    decide(database, alerts[1], "merge", intent=True)
    waited = [
        (database.latest(key=alert).at - database.events(key=alert)[0].at).total_seconds() for alert in alerts[:2]
    ]
    first = samples(settings)
    assert first["evergreen_decision_latency_seconds_count", "more"] == 2
    assert first["evergreen_decision_latency_seconds_sum", "more"] == pytest.approx(sum(waited))
    decide(database, alerts[0], "drop")
    finish(database, "more", {f"run of {alerts[1]}"})
    assert samples(settings)["evergreen_decision_latency_seconds_sum", "more"] == pytest.approx(sum(waited))


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0, "0.1"), (0.1, "0.1"), (0.11, "0.25"), (2, "2.0"), (300, "300.0"), (301, "+Inf")]
)
def test_a_bucket_holds_what_is_not_longer_than_its_bound(seconds, bucket):
    """Buckets are cumulative, and their bounds belong to them."""
    count = metrics.Count()
    alert = db.Event("more", 1, "alert", None, "a", NOW, {"sender": "data"}, "", "")
    count.add(alert)
    count.add(db.Event("more", 2, "decision", None, "a", NOW + timedelta(seconds=seconds), {"outcome": "drop"}, "", ""))
    bounds = [str(float(bound)) for bound in metrics.LATENCY_S] + ["+Inf"]
    assert bounds[count.latencies.index(1)] == bucket


def test_days_since_training_are_those_since_the_train_stage(settings, database):
    """Other stages do not train; a pack that was never trained has no sample."""
    write_pack(settings, "more")
    database.append("more", "stage", {"stage": "ingest"}, run_id="one")
    assert ("evergreen_days_since_training", "more") not in samples(settings)
    trained = train(database, 9, run="one")
    database.append("more", "stage", {"stage": "evaluate"}, run_id="one")
    days = samples(settings)["evergreen_days_since_training", "more"]
    assert 0 < days < (datetime.now(UTC) - trained.at) / timedelta(days=1)


def test_what_is_left_of_a_budget_is_what_admission_would_see(settings, database):
    """Runs that alerts asked for, confirmed or not, and all training, within the period; never less than nothing."""
    write_pack(settings, "more", "{budget: {runs: 3, device_hours: 2}}")
    write_pack(settings, "free")
    left = ("evergreen_budget_runs_left", "more"), ("evergreen_budget_device_hours_left", "more")
    assert [samples(settings)[name] for name in left] == [3, 2]
    alerts = tell(database, *["data"] * 5)
    decide(database, alerts[0], "retrain", intent=True)
    decide(database, alerts[1], "merge")
    train(database, 900, run="one")
    assert [samples(settings)[name] for name in left] == [2, 1.75]
    finish(database, "more", {f"run of {alerts[0]}"})
    assert [samples(settings)[name] for name in left] == [2, 1.75]
    for alert in alerts[2:]:
        decide(database, alert, "retrain", intent=True)
    train(database, 9000, run="two")
    assert [samples(settings)[name] for name in left] == [0, 0]
    assert not any("budget" in name and "free" in labels for name, *labels in samples(settings))


def test_a_budget_forgets_what_is_older_than_its_period(settings, database):
    """A run that was asked for before the period costs nothing any more."""
    write_pack(settings, "more", "{budget: {runs: 3, per: 1d}}")
    decide(database, tell(database, "data")[0], "retrain", intent=True, now=NOW - timedelta(days=2))
    assert samples(settings)["evergreen_budget_runs_left", "more"] == 3


def test_a_pack_without_events_is_there(settings, database):
    """A pack that nobody alerted has zeros, so that an alarm on its absence can be told from quiet."""
    write_pack(settings, "quiet")
    database.made_at()  # an event of the home, which is no pack
    tell(database, "data")
    found = samples(settings)
    assert (found["evergreen_undecided_alerts", "quiet"], found["evergreen_undecided_alerts", "more"]) == (0, 1)
    assert not any(db.HOME in key for key in found)


def test_of_a_pack_that_is_gone_nothing_is_overdue(settings, database):
    """What it did stays counted; nobody is called to a training that will never come, or a failure that nobody can end."""
    overdue = {
        "evergreen_days_since_training",
        "evergreen_failing",
        "evergreen_drift_psi",
        "evergreen_prediction_psi",
        "evergreen_newest_look",
    }
    live(database)
    assert not overdue & {key[0] for key in samples(settings)}
    assert samples(settings)["evergreen_runs_total", "more"] == 1
    write_pack(settings, "more")
    assert overdue <= {key[0] for key in samples(settings)}


def test_a_broken_pack_hides_no_other(settings, database):
    """A pack that cannot be loaded keeps its counts; it has no budget to speak of."""
    write_pack(settings, "broken", "{budget: 7}")
    write_pack(settings, "sound", "{budget: {runs: 3}}")
    found = samples(settings)
    assert found["evergreen_undecided_alerts", "broken"] == 0
    assert {key[1] for key in found if key[0] == "evergreen_budget_runs_left"} == {"sound"}


def test_a_label_may_hold_anything(settings, database):
    """Quotes, backslashes and line breaks in a sender's name are read back as they were."""
    name = 'a "b"\n\\c'
    decide(database, tell(database, name)[0], "dead")
    assert alerts_of(settings) == {("dead", "more", name): 1}


def test_looks_of_the_monitor_are_counted_by_what_they_said(settings, database):
    """A fault of the data is there to be alerted on; so is a look that had nothing to compare with."""
    for number, kind in enumerate(["quiet", "data fault", "data fault", None]):
        database.append("more", "drift", {"stage": "monitor", "value": {"kind": kind}}, run_id=f"watch__{number}")
    found = {key[1:]: value for key, value in samples(settings).items() if key[0] == "evergreen_looks_total"}
    assert found == {("data fault", "more"): 2, ("not compared", "more"): 1, ("quiet", "more"): 1}


def live(database):
    """A run that trains, fails once, and is promoted; and a look."""
    database.append("more", "run", {"as_of": "2013-04-01"}, run_id="one")
    train(database, 9, samples_per_s=100.0)
    database.append(
        "more", "failure", {"stage": "register", "error": "RegistryError", "what": "no", "fix": ""}, run_id="one"
    )
    for status in ("intended", "done"):
        database.append("more", "promotion", {"status": status, "champion": 4, "version": 4}, run_id="one")
    promoted = {"stage": "promote", "value": {"verdict": {"decision": "promote"}, "champion": 4}}
    database.append("more", "stage", promoted, run_id="one")
    look = {"stage": "monitor", "value": {"kind": "quiet", "scores": {"seats": 0.25}, "prediction_score": 0.5}}
    database.append("more", "drift", look, run_id="watch__one")


def test_runs_failures_and_verdicts_are_counted(settings, database):
    """What began, what failed by stage, what the gate said; a look of the monitor is no run."""
    live(database)
    database.append("more", "watch", {"as_of": "2013-04-02"}, run_id="watch__one")
    found = samples(settings)
    assert found["evergreen_runs_total", "more"] == 1
    assert found["evergreen_stage_failures_total", "more", "register"] == 1
    assert found["evergreen_verdicts_total", "promote", "more"] == 1


def test_a_pack_fails_until_a_run_comes_to_its_end(settings, database):
    """Begun again it still fails; its monitor is told apart."""
    write_pack(settings, "more")

    def failing():
        found = samples(settings)
        return [found["evergreen_failing", "more", what] for what in ("training", "monitor")]

    def fail(run):
        body = {"stage": "ingest", "error": "SourceError", "what": "no", "fix": ""}
        database.append("more", "failure", body, run_id=run)

    live(database)
    assert failing() == [0, 0]
    fail("two")
    database.append("more", "run", {"as_of": "2013-04-01"}, run_id="three")
    assert failing() == [1, 0]
    fail("watch__three")
    assert failing() == [1, 1]
    live(database)
    assert failing() == [0, 0]


def test_a_look_that_a_run_kept_from_looking_is_no_failure(settings, database):
    """Its monitor does not fail while a pack trains: the look is counted as skipped, once."""
    write_pack(settings, "more")
    live(database)
    for stage in ("ingest", "monitor"):
        body = {"stage": stage, "error": "LeaseHeldError", "what": "pack more: one is acting", "fix": ""}
        database.append("more", "failure", body, run_id="watch__two")
    found = samples(settings)
    assert (found["evergreen_failing", "more", "monitor"], found["evergreen_looks_total", "skipped", "more"]) == (0, 1)
    assert ("evergreen_stage_failures_total", "more", "ingest") not in found


def test_a_look_at_what_was_looked_at_before_ends_a_failure(settings, database):
    """A receipt, as most looks of a day are: the monitor came to its end; that of another stage says nothing of it."""
    write_pack(settings, "more")
    live(database)
    body = {"stage": "ingest", "error": "StoreError", "what": "no", "fix": ""}
    database.append("more", "failure", body, run_id="watch__two")
    for stage, fails in (("ingest", 1), ("monitor", 0)):
        database.append("more", "receipt", {"stage": stage, "of": "watch__one"}, run_id="watch__three")
        assert samples(settings)["evergreen_failing", "more", "monitor"] == fails


def test_the_champion_is_the_one_of_the_ledger(settings, database):
    """Promoted, rolled back, or moved by somebody's hand: the newest move that was done; an intent is none."""
    live(database)
    assert samples(settings)["evergreen_champion_version", "more"] == 4
    done = database.append("more", "rollback", {"status": "done", "champion": 3}, run_id="two")
    database.append("more", "promotion", {"status": "intended", "champion": 3, "version": 5}, run_id="three")
    found = samples(settings)
    assert found["evergreen_champion_version", "more"] == 3
    assert 0 < found["evergreen_champion_days", "more"] <= (datetime.now(UTC) - done.at) / timedelta(days=1)


def test_training_is_counted_by_device(settings, database):
    """Trainings and their seconds, and how fast the newest was, where its trainer tells."""
    train(database, 9, samples_per_s=100.0)
    train(database, 5, device="cuda", samples_per_s=900.0)
    train(database, 2, device="cuda")
    found = samples(settings)
    assert [found["evergreen_trainings_total", device, "more"] for device in ("cpu", "cuda")] == [1, 2]
    assert [found["evergreen_training_seconds_total", device, "more"] for device in ("cpu", "cuda")] == [9, 7]
    assert ("evergreen_training_samples_per_second", "more") not in found


def test_drift_is_told_by_column_until_the_next_look_that_compares(settings, database):
    """The newest window's; a look that had nothing to compare with leaves it as it was."""
    write_pack(settings, "more")
    live(database)
    database.append("more", "drift", {"stage": "monitor", "value": {"kind": None, "scores": {}}}, run_id="watch__two")
    assert samples(settings)["evergreen_drift_psi", "seats", "more"] == 0.25
    assert samples(settings)["evergreen_prediction_psi", "more"] == 0.5


def test_a_look_that_has_predictions_among_its_columns_is_counted(settings, database):
    """As looks were written once; of those since, a column called `prediction` is a column."""
    write_pack(settings, "more")
    for place, (more, psis) in enumerate([({}, (0.4, None)), ({"prediction_score": 0.1}, (0.1, 0.4))]):
        value = {"kind": "quiet", "scores": {"seats": 0.25, "prediction": 0.4}, **more}
        database.append("more", "drift", {"stage": "monitor", "value": value}, run_id=f"watch__{place}")
        found = samples(settings)
        assert (
            found["evergreen_prediction_psi", "more"],
            found.get(("evergreen_drift_psi", "prediction", "more")),
        ) == psis


def test_drift_and_what_a_look_showed_are_of_the_champion_in_use(settings, database):
    """A new champion has been looked at by nobody: what the one before it showed asks for no second training."""
    write_pack(settings, "more")
    live(database)
    found = samples(settings)
    assert {key[1]: each for key, each in found.items() if key[0] == "evergreen_newest_look"} == {
        **dict.fromkeys((*ACTIONS, "not compared"), 0),
        "quiet": 1,
    }
    assert found["evergreen_drift_psi", "seats", "more"] == 0.25
    database.append("more", "promotion", {"status": "done", "champion": 5, "version": 5}, run_id="two")
    assert not [key for key in samples(settings) if "_psi" in key[0] or key[0] == "evergreen_newest_look"]


def test_the_text_is_as_prometheus_wants_it(settings, database):
    """Help and type for each family; counters end in _total; units are base units; histograms are whole."""
    write_pack(settings, "more", "{budget: {runs: 3, device_hours: 2}}")
    for alert in tell(database, "grafana", "data"):
        decide(database, alert, "drop")
    live(database)
    text = metrics.exposition(settings).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {name: family.type for name, family in families.items()} == {
        "evergreen_alerts": "counter",
        "evergreen_decision_latency_seconds": "histogram",
        "evergreen_undecided_alerts": "gauge",
        "evergreen_days_since_training": "gauge",
        "evergreen_budget_runs_left": "gauge",
        "evergreen_budget_device_hours_left": "gauge",
        "evergreen_looks": "counter",
        "evergreen_runs": "counter",
        "evergreen_stage_failures": "counter",
        "evergreen_failing": "gauge",
        "evergreen_verdicts": "counter",
        "evergreen_champion_version": "gauge",
        "evergreen_champion_days": "gauge",
        "evergreen_trainings": "counter",
        "evergreen_training_seconds": "counter",
        "evergreen_training_samples_per_second": "gauge",
        "evergreen_drift_psi": "gauge",
        "evergreen_prediction_psi": "gauge",
        "evergreen_newest_look": "gauge",
    }
    for name, family in families.items():
        assert family.documentation[-1] == "."
        assert family.samples, name
        assert len({(sample.name, *sample.labels.items()) for sample in family.samples}) == len(family.samples)
        assert re.fullmatch(r"[a-z][a-z_]+", name)
    buckets = [s for s in families["evergreen_decision_latency_seconds"].samples if s.name.endswith("_bucket")]
    assert [float(bucket.labels["le"]) for bucket in buckets] == [*map(float, metrics.LATENCY_S), math.inf]
    assert [bucket.value for bucket in buckets] == sorted(bucket.value for bucket in buckets)
    assert buckets[-1].value == 2


def test_prometheus_can_scrape_it(settings, database):
    """Served over loopback by prometheus_client, as `evergreen metrics --serve` does."""
    decide(database, tell(database, "data")[0], "merge")
    server, thread = start_http_server(0, addr="127.0.0.1", registry=metrics.registry(settings))
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            assert b'evergreen_alerts_total{decision="merge",pack="more",sender="data"} 1.0' in answer.read()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
