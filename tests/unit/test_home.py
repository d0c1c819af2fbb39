"""A home that is moved or copied: what it is taken for, what it refuses, and that the original is left alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from evergreen import home
from evergreen.errors import SettingsError
from evergreen.orchestration import embedded
from evergreen.settings import Settings


def settings_at(place: Path, **places: str) -> Settings:
    given = {f"EVERGREEN_{name.upper()}": value for name, value in places.items()}
    return Settings.from_env({"EVERGREEN_HOME": str(place), **given})


def test_a_question_mark_in_the_path_of_a_home(tmp_path: Path) -> None:
    """It is refused, for a database URL would end there; in the path of the packs it is like any character."""
    with pytest.raises(SettingsError, match="a question mark") as caught:
        settings_at(tmp_path / "what?")
    assert "EVERGREEN_HOME" in caught.value.fix
    assert settings_at(tmp_path, packs=str(tmp_path / "what?")).packs == tmp_path / "what?"


@pytest.fixture
def original(tmp_path: Path) -> Settings:
    """A home that was opened, with Airflow's settings in it."""
    settings = settings_at(tmp_path / "original")
    (settings.home / "airflow").mkdir(parents=True)
    cfg = f"[logging]\nbase_log_folder = {settings.home}/airflow/logs\n"
    (settings.home / "airflow" / "airflow.cfg").write_text(cfg)
    (settings.home / "evergreen.db").touch()
    home.adopt(settings)
    return settings


def marker_of(settings: Settings) -> home.Marker:
    marker = home.read_marker(settings)
    assert marker is not None
    return marker


def content_of(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def copied(settings: Settings, place: Path, **places: str) -> Settings:
    shutil.copytree(settings.home, place)
    return settings_at(place, **places)


def test_a_home_knows_its_place(original):
    """The first opening writes an id and the place; another opening changes nothing."""
    first = content_of(original.home)
    assert marker_of(original).place == str(original.home)
    home.adopt(original)
    assert content_of(original.home) == first
    assert home.whereabouts(original).kind == "here"


def test_a_moved_home_stays_the_same_home(original, tmp_path):
    """It keeps its id, and has the places where it was; Airflow's settings name the new one."""
    before = marker_of(original)
    original.home.rename(tmp_path / "moved")
    moved = settings_at(tmp_path / "moved")
    assert home.whereabouts(moved).kind == "moved"
    home.adopt(moved)
    after = marker_of(moved)
    assert (after.id, after.place, after.before) == (before.id, str(moved.home), (str(original.home),))
    assert str(original.home) not in (moved.home / "airflow" / "airflow.cfg").read_text()
    assert not original.home.exists()


def test_a_home_moved_to_another_disk_stays_the_same_home(original, tmp_path):
    """A folder that was copied, and whose original was then removed, was moved."""
    moved = copied(original, tmp_path / "moved")
    shutil.rmtree(original.home)
    before = marker_of(moved).id
    home.adopt(moved)
    assert (marker_of(moved).id, marker_of(moved).copied_from) == (before, None)


def test_a_copy_knows_that_it_is_one(original, tmp_path):
    """It gets an id of its own and says what it was made from; the original keeps every byte."""
    before = content_of(original.home)
    copy = copied(original, tmp_path / "copy")
    home.adopt(copy)
    assert marker_of(copy).id != marker_of(original).id
    origin = marker_of(copy).copied_from
    assert origin is not None
    assert (origin.id, origin.place) == (marker_of(original).id, str(original.home))
    assert content_of(original.home) == before


def test_a_home_from_another_machine_counts_as_a_copy(original, tmp_path):
    """From here nobody can see whether the original is still used there."""
    copy = copied(original, tmp_path / "copy")
    marker = marker_of(copy).model_copy(update={"host": f"not-{socket.gethostname()}"})
    (copy.home / home.MARKER).write_text(marker.model_dump_json())
    shutil.rmtree(original.home)
    assert home.whereabouts(copy).kind == "copied"


def test_a_home_of_an_earlier_version_is_adopted(original, tmp_path):
    """Without `home.json`, Airflow's settings tell where it was: moved, or copied where the original is still there."""
    (original.home / home.MARKER).unlink()
    copy = copied(original, tmp_path / "copy")
    assert home.whereabouts(original).kind == "new"
    assert home.whereabouts(copy) == home.Whereabouts("copied", original.home)
    original.home.rename(tmp_path / "moved")
    moved = settings_at(tmp_path / "moved")
    assert home.whereabouts(moved) == home.Whereabouts("moved", original.home)
    home.adopt(moved)
    assert marker_of(moved).before == (str(original.home),)
    assert str(original.home) not in (moved.home / "airflow" / "airflow.cfg").read_text()


def test_a_symbolic_link_is_another_name(original, tmp_path):
    """A home that is opened by a link is where it was; moved later, both names are known."""
    (tmp_path / "link").symlink_to(original.home)
    linked = settings_at(tmp_path / "link")
    home.adopt(linked)
    assert (marker_of(original).place, marker_of(original).before) == (str(original.home), (str(linked.home),))
    assert home.whereabouts(original).kind == home.whereabouts(linked).kind == "here"


@pytest.mark.parametrize("place", ["original/deeper", "original-2", "deeper/original"])
def test_an_adoption_that_was_killed_is_finished_by_the_next(original, tmp_path, place):
    """Done again from the start, it ends the same, also where a place is part of the other."""
    aside = original.home.rename(tmp_path / "aside")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    aside.rename(tmp_path / place)
    moved = settings_at(tmp_path / place)
    marker = (moved.home / home.MARKER).read_bytes()
    home.adopt(moved)
    once = (moved.home / "airflow" / "airflow.cfg").read_text()
    assert once == f"[logging]\nbase_log_folder = {moved.home}/airflow/logs\n"
    (moved.home / home.MARKER).write_bytes(marker)  # as a kill before the last step leaves it
    home.adopt(moved)
    assert (moved.home / "airflow" / "airflow.cfg").read_text() == once
    assert marker_of(moved).place == str(moved.home)


def test_many_processes_adopt_a_copy_once(original, tmp_path):
    """All that open it at once find one home with one id."""
    copy = copied(original, tmp_path / "copy")
    ids: list[str] = []

    def adopt() -> None:
        home.adopt(copy)
        ids.append(marker_of(copy).id)

    threads = [threading.Thread(target=adopt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert set(ids) == {marker_of(copy).id}


@pytest.mark.parametrize("original_stays", [True, False])
@pytest.mark.parametrize("name", ["data_remote", "cache", "mlflow_artifacts"])
def test_a_setting_that_names_the_old_place_is_refused(original, tmp_path, name, original_stays):
    """The error names the setting; unset, as it says, the home opens. Nothing is made at the old place."""
    old = original.home / "things"
    copy = copied(original, tmp_path / "copy", **{name: str(old)})
    if not original_stays:
        shutil.rmtree(original.home)
    for _ in range(2):  # also once it is adopted
        with pytest.raises(SettingsError, match=f"EVERGREEN_{name.upper()} is {old}(.|\n)*fix: unset EVERGREEN_"):
            home.adopt(copy)
    assert not old.exists()
    home.adopt(settings_at(copy.home))


def test_a_copy_shares_nothing_outside_with_the_original(original, tmp_path):
    """Given a place of its own, as the error says, it opens; so it does once `copied_from` is removed."""
    shared = f"sqlite:///{tmp_path}/service.db"
    copy = copied(original, tmp_path / "copy", mlflow_tracking_uri=shared)
    with pytest.raises(SettingsError, match=r"is a copy of (.|\n)*MLFLOW_TRACKING_URI(.|\n)*remove `copied_from`"):
        home.adopt(copy)
    home.adopt(settings_at(copy.home))
    file = copy.home / home.MARKER
    marker = json.loads(file.read_text())
    del marker["copied_from"]
    file.write_text(json.dumps(marker))
    home.adopt(copy)
    home.adopt(original.model_copy(update={"mlflow_tracking_uri": shared}))  # the original may


def test_an_unreadable_marker_is_named(original):
    """Removed, as the error says, the home is adopted as one of an earlier version."""
    (original.home / home.MARKER).write_text("{")
    with pytest.raises(SettingsError, match=r"home.json cannot be read(.|\n)*fix: remove"):
        home.adopt(original)
    (original.home / home.MARKER).unlink()
    home.adopt(original)
    assert marker_of(original).place == str(original.home)


@pytest.fixture
def service(original):
    """A process that the original's `services.json` names."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    entry = {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    services = {"mlflow": {"address": "http://127.0.0.1:1", "processes": [entry]}}
    (original.home / home.SERVICES).write_text(json.dumps(services))
    yield process
    process.kill()
    process.communicate()


def test_a_copy_does_not_take_the_originals_processes_for_its_own(original, service, tmp_path):
    """It neither uses nor stops them."""
    copy = copied(original, tmp_path / "copy")
    assert embedded.down(copy) == []
    assert embedded.services(copy) == {}
    assert embedded.down(copy) == []
    assert service.poll() is None
    assert embedded.services(original) == {"mlflow": "http://127.0.0.1:1"}


def test_a_home_that_moved_under_its_services_waits_until_they_are_stopped(original, service, tmp_path):
    """They write to the old place. `evergreen down`, which the error names, stops them; then the home opens."""
    original.home.rename(tmp_path / "moved")
    moved = settings_at(tmp_path / "moved")
    with pytest.raises(SettingsError, match=r"while mlflow ran(.|\n)*evergreen down"):
        home.adopt(moved)
    assert embedded.down(moved) == ["mlflow"]
    home.adopt(moved)
    assert marker_of(moved).place == str(moved.home)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_a_home_may_move_to_another_user(original, tmp_path):
    """The marker says nothing of users."""
    original.home.rename(tmp_path / "moved")
    for path in (tmp_path / "moved", *(tmp_path / "moved").rglob("*")):
        os.chown(path, 65534, 65534)
    home.adopt(settings_at(tmp_path / "moved"))
    assert marker_of(settings_at(tmp_path / "moved")).before == (str(original.home),)
