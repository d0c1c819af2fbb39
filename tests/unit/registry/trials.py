"""Trials that kill processes or let them race: run as a script, which prints one JSON line.

    trials.py HOME RACES [CALL …]
    trials.py HOME approval [STEP …]

register    a registration is killed after each of these calls of MLflow's client (of every call where none is named),
            then tried again
promote     a promotion is killed after each of its writes, then tried again
next        the same after the first two, but the promotion of another run comes next
race        two processes promote, judged against the same champion, RACES times
rollback    a rollback is killed after each of its writes, then asked for again, or a promotion comes next
back        a promotion and a rollback from the same champion race, RACES times
approval    a person is asked and answers, in a process that is killed after each of these writes (`promote 2`; each of
            its writes where none is named), then tried again

The script imports MLflow once and then forks; it opens no database itself before the last child has ended, since SQLite
connections do not survive a fork.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import sqlalchemy as sa
from conftest import model_folder, register, run_of, settings_at

from evergreen.database import Database, leases
from evergreen.errors import RegistryError
from evergreen.registry import approval, models, promotion
from evergreen.run import Verdict

PROMOTE = Verdict(decision="promote", reasons=("better",))
REVIEW = Verdict(decision="review", reasons=("nobody can tell",))


def child(function, *arguments) -> bool:
    """Run `function` in a fork; whether it came to its end. A failure other than its own SIGKILL ends the script."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status != 0:
        sys.exit("a child failed")
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingClient:
    """MLflow's client, in a process that is killed when the call named `last` has been made."""

    def __init__(self, client, last: str, seen: list[str]) -> None:
        self.client, self.last, self.seen = client, last, seen

    def __getattr__(self, name: str):
        method = getattr(self.client, name)

        def call(*arguments, **keywords):
            answer = method(*arguments, **keywords)
            self.seen.append(name)
            if f"{name}#{self.seen.count(name)}" == self.last:
                die()
            return answer

        return call


class DyingRegistry(models.Registry):
    """A registry in a process that is killed when the call named `last` has been made."""

    def __init__(self, settings, last: str, seen: list[str]) -> None:
        super().__init__(settings)
        self.last, self.seen = last, seen

    @functools.cached_property
    def _client(self):
        return DyingClient(models.Registry._client.func(self), self.last, self.seen)


def trial_register(home: Path, calls: list[str]) -> list[dict]:
    settings = settings_at(home)
    folder = model_folder(home / "trained")
    if not calls:  # every call of an undisturbed registration

        def undisturbed() -> None:
            register(registry := DyingRegistry(settings, "", []), "undisturbed", folder)
            counts: Counter[str] = Counter()
            named = [f"{name}#{counts[name]}" for name in registry.seen if counts.update([name]) is None]
            (home / "calls.json").write_text(json.dumps(named))

        child(undisturbed)
        calls = json.loads((home / "calls.json").read_text())
    killed = {}
    for number, call in enumerate(calls):
        name = f"m{number}"
        killed[name] = (call, child(lambda at=call, of=name: register(DyingRegistry(settings, at, []), of, folder)))
        child(lambda of=name: register(models.Registry(settings), of, folder))
    registry = models.Registry(settings)
    found = []
    for name, (call, survived) in killed.items():
        client = registry._client
        experiment = client.get_experiment_by_name(name).experiment_id
        runs = client.search_runs([experiment])
        found.append(
            {
                "call": call,
                "killed": not survived,
                "versions": [(version.version, version.complete) for version in registry.versions(name)],
                "lineage": registry.lineage(name, 1)["version"],
                "runs": [run.info.status for run in runs],
                "same_run": [run.info.run_id for run in runs] == [registry.version(name, 1).run_id],
                "logged_models": len(client.search_logged_models([experiment])),
            }
        )
    return found


class DyingDatabase(Database):
    """An events database in a process that is killed after `left` writes: appends here, alias moves and tags beside."""

    def __init__(self, url: str, left: list[int]) -> None:
        super().__init__(url)
        self.left = left

    @contextlib.contextmanager
    def chain(self, pack):
        with super().chain(pack) as chain:
            before = chain._position
            yield chain
        if chain._position != before:
            count_down(self.left)


class DyingAliases(models.Registry):
    """A registry whose alias moves and verdicts count as writes of the same process."""

    def __init__(self, settings, left: list[int]) -> None:
        super().__init__(settings)
        self.left = left

    def set_alias(self, *arguments) -> None:
        super().set_alias(*arguments)
        count_down(self.left)

    def judge(self, *arguments) -> None:
        super().judge(*arguments)
        count_down(self.left)

    def tag(self, name, version, tags) -> None:
        super().tag(name, version, tags)
        if "evergreen.rolled_back" in tags:
            count_down(self.left)


class DyingAsker(DyingAliases):
    """The same, each alias that is taken off counted too."""

    def drop_alias(self, *arguments) -> None:
        super().drop_alias(*arguments)
        count_down(self.left)


def count_down(left: list[int]) -> None:
    left[0] -= 1
    if left[0] == 0:
        die()


def prepare(settings) -> None:
    """The model `racer` with three versions, none of them champion."""
    registry = models.Registry(settings)
    folder = model_folder(settings.home / "racer")
    for key in ("first", "second", "third"):
        register(registry, "racer", folder, key=key)


def promote(settings, run: str, version: int, judged_against: int | None, kill_after: int = 0) -> None:
    left = [kill_after]
    promotion.promote(
        DyingDatabase(settings.database_url, left),
        DyingAliases(settings, left),
        run=run_of("racer", run, settings),
        version=version,
        judged_against=judged_against,
        verdict=PROMOTE,
    )


def roll_back(settings, run: str, version: int, leave: int, kill_after: int = 0) -> None:
    """As `loop/rollback.py` does it when it has verified the version: settle, look whether it was done, go back."""
    left = [kill_after]
    database, registry = DyingDatabase(settings.database_url, left), DyingAliases(settings, left)
    promotion.settle(database, registry, "racer", holder=run)
    asked = {"to": version, "why": "a trial", "by": "ada"}
    if promotion.answered(database, "racer", asked, run) is None:
        promotion.roll_back(database, registry, "racer", version=version, leave=leave, asked=asked, run_id=run)


def look(settings, file: Path) -> None:
    """Write down where the alias is, what the verdict on it is, and every event."""
    registry = models.Registry(settings)
    champion = registry.champion("racer")
    database = Database(settings.database_url)
    events = database.events("racer", kind=promotion.MOVES)
    found = {
        "champion": champion.version,
        "verdict": registry.lineage("racer", champion.version)["verdict"],
        "events": [(event.run_id, event.body["status"], event.body.get("version")) for event in events],
        "agrees": events[-1].body["champion"] == champion.version and database.first_bad("racer") is None,
        "left": sorted(promotion.left(database, "racer")),
    }
    file.write_text(json.dumps(found))


def trial_promote(settings, champion: int | None, kills: tuple[int, ...], *, other_comes_next: bool) -> list[dict]:
    """Kill after these writes of a promotion: 1 the intent, 2 the alias, 3 the verdict, 4 the end."""
    file, found = settings.home / "look.json", []

    def come_next(third: int, judged_against: int | None, other: str) -> None:
        with Database(settings.database_url).engine.begin() as connection:  # as if the dead one's lease had run out
            connection.execute(sa.update(leases).values(expires_at="2000-01-01T00:00:00.000000+00:00"))
        promote(settings, other, third, judged_against)

    def retry(run: str, version: int, judged_against: int | None) -> None:
        promote(settings, run, version, judged_against)
        look(settings, file)

    for writes in kills:
        run, other = f"killed after {writes}, next {other_comes_next}", f"other after {writes}"
        version, third = [candidate for candidate in (1, 2, 3) if candidate != champion][:2]
        killed = not child(promote, settings, run, version, champion, writes)
        if other_comes_next:
            child(come_next, third, champion, other)
        child(retry, run, version, champion)
        seen = json.loads(file.read_text())
        champion = seen["champion"]
        found.append(
            {
                "writes": writes,
                "killed": killed,
                "champion": champion == version,
                "verdict": seen["verdict"]["decision"],
                "events": [status for at, status, of in seen["events"] if at == run and of == version],
                "others": [status for at, status, _ in seen["events"] if at == other],
            }
        )
    return found


def trial_rollback(settings, champion: int, kills: tuple[int, ...], *, other_comes_next: bool) -> list[dict]:
    """Kill after these writes of a rollback: 1 the intent, 2 the alias, 3 the tag, 4 the end."""
    file, found = settings.home / "look.json", []

    def come_next(version: int, judged_against: int, other: str) -> None:
        with Database(settings.database_url).engine.begin() as connection:
            connection.execute(sa.update(leases).values(expires_at="2000-01-01T00:00:00.000000+00:00"))
        promote(settings, other, version, judged_against)

    def again(run: str, version: int, leave: int) -> None:
        roll_back(settings, run, version, leave)
        look(settings, file)

    for writes in kills:
        run, other = f"back, killed after {writes}, next {other_comes_next}", f"other after back {writes}"
        version, third = [candidate for candidate in (1, 2, 3) if candidate != champion][:2]
        killed = not child(roll_back, settings, run, version, champion, writes)
        if other_comes_next:
            child(come_next, third, champion, other)
        child(again, run, version, champion)
        seen = json.loads(file.read_text())
        found.append(
            {
                "writes": writes,
                "killed": killed,
                "champion": seen["champion"] == version,
                "agrees": seen["agrees"],
                "left": (champion in seen["left"]) == (version < champion),
                "events": [status for at, status, of in seen["events"] if at == run and of == version],
                "others": [status for at, status, _ in seen["events"] if at == other],
            }
        )
        champion = seen["champion"]
    return found


def trial_race(settings, races: int, *, back: bool = False) -> dict:
    """Two processes promote, or one of them goes back: each from the same champion."""
    prefix = f"race {'back ' if back else ''}"
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)

    def race(me: int) -> None:
        registry, database = models.Registry(settings), Database(settings.database_url)
        for number in range(races):
            barrier.wait()
            champion = registry.champion("racer").version
            version = [candidate for candidate in (1, 2, 3) if candidate != champion][me]
            run = run_of("racer", f"{prefix}{number} of {me}", settings)
            barrier.wait()
            if back and me:
                with contextlib.suppress(RegistryError):  # the champion is another by then
                    asked = {"to": version, "why": "a race", "by": "ada"}
                    promotion.roll_back(
                        database, registry, "racer", version=version, leave=champion, asked=asked, run_id=run.id
                    )
            else:
                promotion.promote(
                    database, registry, run=run, version=version, judged_against=champion, verdict=PROMOTE
                )

    racers = [fork.Process(target=race, args=(me,)) for me in (0, 1)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        if racer.exitcode != 0:
            sys.exit("a racer failed")
    database, registry = Database(settings.database_url), models.Registry(settings)
    by_race: dict[str, list[str]] = {}
    moves = database.events("racer", kind=promotion.MOVES)
    events = [event for event in moves if (event.run_id or "").startswith(prefix)]
    for event in events:
        by_race.setdefault(event.run_id.rpartition(" of ")[0], []).append(event.body["status"])
    return {
        "races": len(by_race),
        "odd": [statuses for statuses in by_race.values() if statuses != ["intended", "done", "void"]],
        "last_done": [event.body["version"] for event in events if event.body["status"] == "done"][-1:],
        "on_alias": [version.version for version in registry.versions("racer") if "champion" in version.aliases],
        "first_bad": database.first_bad("racer"),
    }


def approve(
    settings, what: str, run: str, version: int, judged_against: int | None, kill_after: int, seen: Path
) -> None:
    """Ask, or answer; then the writes that it took are written down."""
    left = [kill_after]
    database, registry = DyingDatabase(settings.database_url, left), DyingAsker(settings, left)
    of = run_of("racer", run, settings)
    if what == "ask":
        asked = {"run": of, "version": version, "judged_against": judged_against, "verdict": REVIEW}
        approval.ask(database, registry, **asked)
    else:
        said = approval.Answer(choice=what, person="ada", comment="because", through="terminal")
        approval.answer(database, registry, run=of, answer=said, holder="the answer")
    seen.write_text(str(kill_after - left[0]))


class Approvals:
    """Versions of `racer` by turns, each asked for and answered."""

    def __init__(self, settings) -> None:
        self.settings = settings
        self.seen, self.file = settings.home / "writes", settings.home / "approval.json"
        self.champion: int | None = None
        self.run, self.version = "", 0

    def begin(self, run: str) -> None:
        self.run, self.version = run, next(each for each in (1, 2, 3) if each != self.champion)

    def once(self, what: str, kill_after: int = 0) -> bool:
        """Ask, or answer; whether it came to its end."""
        return child(approve, self.settings, what, self.run, self.version, self.champion, kill_after, self.seen)

    def told(self) -> dict:
        """Where the aliases are, and what was written down of this run."""
        child(self._tell)
        return json.loads(self.file.read_text())

    def _tell(self) -> None:
        registry, database = models.Registry(self.settings), Database(self.settings.database_url)
        kinds = (approval.KIND, promotion.KIND)
        told = {
            "aliases": {alias: one.version for one in registry.versions("racer") for alias in one.aliases},
            "verdict": registry.lineage("racer", self.version)["verdict"]["reasons"],
            **{
                kind: [e.body["status"] for e in database.events("racer", kind=kind, run_id=self.run)] for kind in kinds
            },
            "first bad": database.first_bad("racer"),
        }
        self.file.write_text(json.dumps(told))


def trial_approval(settings, steps: list[str]) -> list[dict]:
    """For each answer: undisturbed, then by a process that dies at each step, and again by one that does not."""
    trial, found = Approvals(settings), []
    for choice in ("promote", "reject"):
        trial.begin(f"undisturbed {choice}")
        writes = [
            f"{what} {n + 1}"
            for what in ("ask", choice)
            if trial.once(what)
            for n in range(int(trial.seen.read_text()))
        ]
        undisturbed = trial.told()
        trial.champion = undisturbed["aliases"].get("champion")
        for step in [step for step in writes if not steps or step in steps]:
            found.append(killed_at(trial, choice, step, undisturbed))
            trial.champion = trial.told()["aliases"].get("champion")
    return found


def killed_at(trial: Approvals, choice: str, step: str, undisturbed: dict) -> dict:
    trial.begin(f"{choice}, killed at {step}")
    killed = False
    for what in ("ask", choice):
        if step.startswith(what):
            killed = not trial.once(what, int(step.removeprefix(what)))
        assert trial.once(what)
    left = trial.told()
    return {
        "step": step,
        "killed": killed,
        "champion": left["aliases"].get("champion") == (trial.version if choice == "promote" else trial.champion),
        "waits": "challenger" in left["aliases"],
        "as undisturbed": [name for name in left if name != "aliases" and left[name] != undisturbed[name]] == [],
    }


if __name__ == "__main__":
    if sys.argv[2] == "approval":
        at = settings_at(Path(sys.argv[1]))
        models._mlflow()
        child(prepare, at)
        sys.stdout.write(json.dumps(trial_approval(at, sys.argv[3:])) + "\n")
        sys.exit()
    place, races, *calls = sys.argv[1:]
    models._mlflow()
    import mlflow.store.model_registry.sqlalchemy_store
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    at = settings_at(Path(place))
    child(prepare, at)
    answer = {
        "promote": trial_promote(at, None, (1, 2, 3, 4), other_comes_next=False),
        # Four promotions of the first two versions by turns: version 2 is champion now.
        "next": trial_promote(at, 2, (1, 2), other_comes_next=True),
    }
    # Each of these leaves version 2 as the champion.
    answer["rollback"] = trial_rollback(at, 2, (1, 2, 3, 4), other_comes_next=False)
    answer["overtaken"] = trial_rollback(at, 2, (1, 2), other_comes_next=True)
    # A race ends with connections of its own: none but the last may be of this process.
    file = at.home / "race.json"
    child(lambda: file.write_text(json.dumps(trial_race(at, int(races)))))
    answer["race"] = json.loads(file.read_text())
    answer["back"] = trial_race(at, int(races), back=True)
    answer["register"] = trial_register(Path(place) / "killed", calls)
    sys.stdout.write(json.dumps(answer) + "\n")
