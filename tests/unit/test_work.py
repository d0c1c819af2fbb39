"""Folders that stages work in."""

from datetime import UTC, datetime

from evergreen import laws
from evergreen.pack import load
from evergreen.run import Run
from evergreen.settings import Settings
from evergreen.work import work_folder


def run_of(settings: Settings, pack: str) -> Run:
    if not (settings.packs / pack).exists():
        laws.scaffold(settings.packs, pack)
    as_of = datetime(2026, 1, 1, tzinfo=UTC)
    return Run(pack=load(settings.packs, pack), id="scheduled__1", as_of=as_of, reason="a test", settings=settings)


def settings_of(tmp_path) -> Settings:
    return Settings.from_env({"EVERGREEN_HOME": str(tmp_path), "EVERGREEN_PACKS": str(tmp_path / "packs")})


def test_two_packs_may_share_a_run_id(tmp_path):
    """Airflow's run ids are unique within a DAG only: a tick of two packs' crons leaves each its own folder."""
    settings = settings_of(tmp_path)
    with work_folder(run_of(settings, "one")) as folder:
        with work_folder(run_of(settings, "two")):
            pass
        assert folder.is_dir()


def test_what_a_killed_attempt_left_is_removed(tmp_path):
    """The retry of a run finds no rubbish of the attempt before it."""
    settings = settings_of(tmp_path)
    run = run_of(settings, "one")
    with work_folder(run) as left:
        kept = settings.jobs / f"{left.name}-killed"
        kept.mkdir()
    with work_folder(run):
        assert not kept.exists()
