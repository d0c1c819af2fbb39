"""One alert again and again, fifty at a time, in any order, while whatever decides it is killed: one run, none lost."""

import contextlib
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.e2e.test_admission import Admitting, known
from tests.e2e.test_scheduler import until

from evergreen.errors import AlertError
from evergreen.settings import Settings
from evergreen.triggers import inbox, senders, signatures

pytestmark = [pytest.mark.slow, pytest.mark.fault]

AT_ONCE = 50
VICTIMS = ["scheduler", "api.server", "triggerer"]


class Storm(Admitting):
    """A home whose only pack is alerted by a sender that sends until it is answered, as every sender does."""

    def send(self, number):
        """The id that the alert was given."""
        settings = Settings.from_env(self.env)
        secret = senders.own_secret(settings)
        message = {"reason": "it drifts", "fingerprint": "drift", "evidence": {"number": number}}
        address = f"http://127.0.0.1:{self.ports[0]}"

        def answered():
            with contextlib.suppress(AlertError):
                return signatures.post(address, "storm", secret, message, id=f"message-{number}")["alert"]

        return until(answered)


def weather(home, count, *, bell, postgres=None, kills):
    """`count` alerts, some sent twice, shuffled; `kills` times between, something is killed, and comes again."""
    chance = random.Random(7)
    numbers = [*range(count), *chance.sample(range(count), count // 10)]
    chance.shuffle(numbers)
    batches = [numbers[n : n + AT_ONCE] for n in range(0, len(numbers), AT_ONCE)]
    victims = [name for name in VICTIMS if bell or name != "triggerer"] + (["postgres"] if postgres else [])
    answers = {}
    if not bell:
        home.kill("triggerer")
    with ThreadPoolExecutor(AT_ONCE) as senders_at_work:
        for turn, batch in enumerate(batches):
            sent = {number: senders_at_work.submit(home.send, number) for number in batch}
            if turn * kills // len(batches) != (turn + 1) * kills // len(batches):
                victim = victims[(turn * kills // len(batches)) % len(victims)]
                if victim == "postgres":
                    postgres.kill()
                    postgres.start()
                else:
                    home.kill(victim, keepers=False)
            for number, answer in sent.items():
                assert answers.setdefault(number, answer.result()) == answer.result(), "another id for the same message"
    return answers


def look(home, answers):
    """What is to hold after any weather."""
    until(lambda: len(home.finals("storm")) >= len(answers))
    until(lambda: home.begun("storm"))
    kept = [event.key for event in home.database.events("storm", kind="alert")]
    decisions = [event for event in home.database.events("storm", kind="decision") if event.body["outcome"] != "hold"]
    assert sorted(kept) == sorted(answers.values()), "all that was answered was kept, and each once"
    assert sorted(event.key for event in decisions) == sorted(kept), "one final decision each"
    assert [event.body["outcome"] for event in decisions].count("retrain") == 1
    assert {event.body["outcome"] for event in decisions} <= {"retrain", "merge", "drop"}
    assert len(home.dag_runs("storm")) == len(home.begun("storm")) == 1, "one run"
    assert inbox.intended(home.database) == []
    assert home.database.first_bad("storm") is None


@pytest.fixture
def home(tmp_path, request, monkeypatch):
    """A home brought up, its events where the test says."""
    if request.param == "postgresql":
        monkeypatch.setenv("EVERGREEN_DATABASE_URL", request.getfixturevalue("postgres").database())
    home = Storm(tmp_path)
    home.pack("storm")
    try:
        home.evergreen("up")
        until(lambda: "storm__train" in known(home))
        yield home
    finally:
        home.down()


@pytest.mark.parametrize("home", ["sqlite"], indirect=True)
def test_a_squall(home):
    """Sixty, and the scheduler killed with its tasks while they come."""
    look(home, weather(home, 60, bell=True, kills=1))


@pytest.mark.prove
@pytest.mark.parametrize(("home", "bell"), [("sqlite", True), ("sqlite", False)], indirect=["home"])
def test_a_thousand_copies(home, bell):
    """With the bell, and by the minute's run alone; everything killed in its turn."""
    look(home, weather(home, 1000, bell=bell, kills=8))


@pytest.mark.prove
@pytest.mark.parametrize("home", ["postgresql"], indirect=True)
def test_a_thousand_copies_and_a_database_that_is_killed(home, postgres):
    """PostgreSQL among what is killed."""
    look(home, weather(home, 1000, bell=True, postgres=postgres, kills=8))
