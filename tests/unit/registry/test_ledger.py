"""The ledger: who was champion when and why, and whether what it says is what was written."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from evergreen.database import Database, _hash_of, events
from evergreen.errors import RegistryError
from evergreen.registry import ledger, promotion
from evergreen.registry.ledger import Checkpoint
from evergreen.run import Verdict

HASHED = ("pack", "position", "kind", "run_id", "key", "at", "body", "previous")
LENGTH, CHECKPOINTS = 24, (7, 15, 24)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A database with the chains of two packs, and its rows as they were written."""
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('ledger') / 'events.db'}")
    for number in range(LENGTH):
        for pack in ("a", "b"):
            run = f"run {number // 5}" if number % 3 else None
            database.append(pack, ("run", "stage", "promotion")[number % 3], {"n": number, "of": [pack]}, run_id=run)
    with database.reading() as connection:
        rows = [dict(row) for row in connection.execute(sa.select(events)).mappings()]
    return database, rows


@pytest.fixture
def chain(written):
    """The same, as it was before each tampering."""
    database, rows = written

    def restore() -> None:
        with database.writing() as connection:
            connection.execute(sa.delete(events))
            connection.execute(sa.insert(events), rows)

    restore()
    yield database, restore
    restore()


def heads(database: Database, pack: str = "a") -> list[Checkpoint]:
    return [Checkpoint.of(event) for event in database.events(pack) if event.position in CHECKPOINTS]


class Tampering:
    """What somebody may do who can write to the database. Each returns the position where the chain is first not right."""

    def __init__(self, connection: sa.Connection, seed: int) -> None:
        self.connection = connection
        self.chance = random.Random(seed)
        self.at = self.chance.randint(1, LENGTH)

    def update(self, place: int, /, **values: object) -> None:
        query = sa.update(events).where(events.c.pack == "a", events.c.position == place).values(**values)
        assert self.connection.execute(query).rowcount == 1

    def row(self, position: int) -> dict:
        query = sa.select(events).where(events.c.pack == "a", events.c.position == position)
        return dict(self.connection.execute(query).mappings().one())

    def rows_from(self, position: int) -> list[dict]:
        query = sa.select(events).where(events.c.pack == "a", events.c.position >= position).order_by(events.c.position)
        return [dict(row) for row in self.connection.execute(query).mappings()]

    def edit(self) -> int:
        """Any field, to any other value."""
        row = self.row(self.at)
        values = {
            "pack": ["c", "-home-"],
            "position": [LENGTH + 50, 0, -1],
            "kind": ["decision", ""],
            "run_id": ["another run", ""],
            "key": ["k", ""],
            "at": [row["at"].replace("+00:00", "Z"), "2020-01-01T00:00:00+00:00", "never"],
            "body": [
                row["body"].replace(":", ": "),
                row["body"][:-1],
                '{"n":99}',
                b"\x00",
                f'{{"n":7,{row["body"][1:]}',
            ],
            "previous": ["0" * 63 + "1", ""],
            "hash": ["0" * 64, ""],
            "stage": ["promote"],
            "as_of": ["2013-04-01T00:00:00+00:00"],
        }
        column = self.chance.choice(sorted(values))
        self.update(self.at, **{column: self.chance.choice(values[column])})
        # Out of its place before all others, it is the first that is wrong.
        first = self.connection.execute(sa.select(sa.func.min(events.c.position)).where(events.c.pack == "a")).scalar()
        return 1 if first < 1 else self.at

    def delete(self) -> int:
        self.connection.execute(sa.delete(events).where(events.c.pack == "a", events.c.position == self.at))
        return self.at

    def insert(self) -> int:
        """Strangers before an event, hashes and links of their own in order; what comes after moves on."""
        number = self.chance.randint(1, 3)
        for row in reversed(self.rows_from(self.at)):
            self.update(row["position"], position=row["position"] + number)
        previous = self.row(self.at - 1)["hash"] if self.at > 1 else "0" * 64
        for position in range(self.at, self.at + number):
            row = {"pack": "a", "position": position, "kind": "promotion", "run_id": None, "key": None}
            row |= {"at": "2026-01-01T00:00:00+00:00", "body": '{"status":"done"}', "previous": previous}
            previous = _hash_of(row)
            self.connection.execute(sa.insert(events).values(**row, hash=previous))
        return self.at

    def swap(self) -> int:
        one, other = sorted(self.chance.sample(range(1, LENGTH + 1), 2))
        self.update(one, position=-5)
        self.update(other, position=one)
        self.update(-5, position=other)
        return one

    def cut(self) -> int:
        """The end of the chain is gone: what is left is whole."""
        self.connection.execute(sa.delete(events).where(events.c.pack == "a", events.c.position >= self.at))
        return self.at

    def make_anew(self) -> int:
        """An edit, and every hash after it made anew: what is there is whole."""
        self.update(self.at, body='{"n":99}')
        previous = self.row(self.at)["previous"]
        for row in self.rows_from(self.at):
            row |= {"previous": previous}
            position, previous = row["position"], _hash_of({name: row[name] for name in HASHED})
            self.update(position, previous=row["previous"], hash=previous)
        return self.at


KINDS = ("edit", "edit", "delete", "insert", "swap", "cut", "make_anew")


def tampered(database: Database, seed: int) -> tuple[str, int]:
    """Tamper with the chain of the pack `a` by chance; how, and where."""
    kind = KINDS[seed % len(KINDS)]
    with database.writing() as connection:
        return kind, getattr(Tampering(connection, seed), kind)()


def test_an_untouched_ledger_holds(chain):
    """Every event is what was written, up to the newest checkpoint and beyond."""
    database, _ = chain
    database.append("a", "run", {})
    found = ledger.verify(database, "a", heads(database))
    assert (found.holds, found.events, found.checkpoints, found.uncovered) == (True, LENGTH + 1, 3, 1)


@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(100, 3000), marks=pytest.mark.prove)])
def test_every_tampering_is_found_and_its_place_named(chain, seeds):
    """An edit of any field, a removal, an insertion, a swap, a cut, and a chain made anew: 100 of 100.

    The first bad entry is named; where the chain was made anew from there on, the two checkpoints that it lies between.
    """
    database, restore = chain
    checkpoints = heads(database)
    wrong = []
    for seed in seeds:
        restore()
        kind, place = tampered(database, seed)
        found = ledger.verify(database, "a", checkpoints)
        named = found.good < place <= (found.first_bad or 0) if kind == "make_anew" else found.first_bad == place
        if found.holds or not named:
            wrong.append((seed, kind, place, found))
    assert wrong == []


def test_without_checkpoints_a_cut_does_not_show(chain):
    """What the checkpoints are for: the rest of a chain that was cut off, or made anew, is whole in itself."""
    database, restore = chain
    holds = {}
    for kind in ("cut", "make_anew", "delete"):
        restore()
        with database.writing() as connection:
            tampering = Tampering(connection, 3)
            tampering.at = 9
            getattr(tampering, kind)()
        holds[kind] = ledger.verify(database, "a", ()).holds
    assert holds == {"cut": True, "make_anew": True, "delete": False}


def test_a_pack_that_is_gone_is_missed(chain):
    """All events of a pack deleted: its checkpoints remain."""
    database, _ = chain
    checkpoints = heads(database, "b")
    with database.writing() as connection:
        connection.execute(sa.delete(events).where(events.c.pack == "b"))
    found = ledger.verify(database, "b", checkpoints)
    last = max(each.position for each in checkpoints)
    lost = "event 1 was" if last == 1 else f"events 1 to {last} were"
    assert (found.holds, found.first_bad) == (False, 1)
    assert found.what == f"{lost} cut off, with whatever came after"


def test_a_checkpoint_is_what_it_says():
    """It is read as it was written; what is no checkpoint is refused."""
    one = Checkpoint(position=12, hash="f" * 64)
    assert Checkpoint.parse(str(one)) == one
    with pytest.raises(RegistryError, match="is no checkpoint"):
        Checkpoint.parse("twelve")


def test_history_says_who_decided_on_what_evidence(promote, database, registry, model):
    """A person's and the gate's promotion with its run, headline and alerts; a foreign move; a rollback with who asked, and why."""
    database.append(model, "run", {"as_of": "2013-04-01T00:00:00+00:00", "reason": "drift"}, run_id="run of 2")
    database.append(model, "decision", {"outcome": "retrain"}, run_id="run of 2", key="alert-1")
    answer = {"status": "answered", "version": 1, "choice": "promote", "person": "grace", "comment": "at last"}
    database.append(model, "approval", answer, run_id="run of 1")
    promote(1, None)
    promote(2, 1, Verdict(decision="promote", reasons=("better by 0.02", "and quick")))
    registry.set_alias(model, "champion", 3)
    promotion.settle(database, registry, model)
    asked = {"to": 2, "why": "it was never trained", "by": "ada"}
    promotion.roll_back(database, registry, model, version=2, leave=3, asked=asked, run_id="back")
    found = ledger.reigns(database, model)
    assert [(reign.version, reign.by, reign.who, reign.run_id) for reign in found] == [
        (1, "person", "grace", "run of 1"),
        (2, "gate", None, "run of 2"),
        (3, "foreign", None, None),
        (2, "rollback", "ada", "back"),
    ]
    assert [reign.why for reign in found[1::2]] == ["better by 0.02", "it was never trained"]
    assert (found[1].alerts, found[1].as_of) == (("alert-1",), datetime(2013, 4, 1, tzinfo=UTC))
    assert [reign.until for reign in found] == [*(reign.since for reign in found[1:]), None]


def test_history_answers_for_any_instant(promote, database, model):
    """Which version was champion last Tuesday: the one whose reign holds the instant; none before the first."""
    promote(1, None)
    promote(2, 1)
    first, second = ledger.reigns(database, model)
    moment = timedelta(microseconds=1)
    asked = [first.since - moment, first.since, second.since - moment, second.since, datetime.now(UTC)]
    found = [ledger.at((first, second), instant) for instant in asked]
    assert [reign.version if reign else None for reign in found] == [None, 1, 1, 2, 2]


def test_a_model_without_a_champion_has_no_reign(database):
    """Before the first promotion the history is empty, and no error."""
    database.append("flights", "run", {"as_of": "2013-04-01T00:00:00+00:00"}, run_id="one")
    assert ledger.reigns(database, "flights") == []


def test_an_unknown_model_is_named(database):
    """A model of which there is no event has no history; one of a like name is shown."""
    database.append("digits", "run", {})
    with pytest.raises(RegistryError, match="did you mean 'digits'"):
        ledger.reigns(database, "digit")


@pytest.mark.parametrize(
    ("were", "champion", "left", "expected"),
    [
        ([1, 2], 2, [], 1),
        ([1], 1, [], None),
        ([1, 2, 3, 2], 2, [3], 1),
        ([1, 2, 1, 3], 3, [2], 1),
        ([1, 2, None], None, [], 2),
        ([1, 2, 3], 3, [2], 1),
    ],
)
def test_the_way_back_leads_to_the_champion_before(were, champion, left, expected):
    """Before it first came, and not one that was left for a reason; twice in a row, it leads further back."""
    now = datetime.now(UTC)
    reign = {"since": now, "until": now, "by": "gate", "who": None, "why": "", "run_id": None, "as_of": None}
    reign |= {"alerts": (), "verdict": None, "position": 1}
    reigns = [ledger.Reign(version=version, **reign) for version in were]
    assert ledger.before(reigns, champion, left) == expected
