"""What an earlier run did is taken over with a receipt, after its outputs were verified, and never on trust."""

import json

import polars as pl
import pytest

from evergreen.history import history_of

STAGES = ["ingest", "validate", "snapshot", "train", "evaluate", "register", "promote"]
SHARED = ["validate", "snapshot", "train", "evaluate", "register"]
"""Every run looks at the source and asks the gate; the rest another run may have done."""

pytestmark = [pytest.mark.usefixtures("kept"), pytest.mark.slow]


def alter(path):
    """Turn the last bit of the file's last byte."""
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    path.chmod(0o444)


def outcome(home, run_id):
    return history_of(home.database, run_id)["outcome"]


def test_a_run_with_nothing_new_is_skipped_with_receipts(home):
    """Each names the run that did the same, verified again; the run ends `unchanged` and leaves nothing behind it."""
    home.perform("settled")  # whatever other tests have made champion, these data's model is champion now
    home.perform("settled again")  # and has been compared with itself
    before = home.visible()
    home.perform("unchanged")
    receipts = home.events("receipt", "unchanged")
    assert home.stages("receipt", "unchanged") == SHARED
    assert home.stages("stage", "unchanged") == ["ingest", "promote"]
    for receipt in receipts:
        made_by = home.database.latest("tide", kind="stage", key=receipt.key)
        assert (receipt.body["of"], receipt.body["verified"]) == (made_by.run_id, True)
    assert outcome(home, "unchanged") == "unchanged"
    assert home.visible() == before


def test_a_forced_run_does_the_work_again(home):
    """All seven stages run; the same rows and code make the same model, and so no second version."""
    versions = home.visible()["versions"]
    values = home.perform("forced", force=True)
    assert (home.stages("stage", "forced"), home.stages("receipt", "forced")) == (STAGES, [])
    assert values["register"].new is False
    assert [version.version for version in home.visible()["versions"]] == [version.version for version in versions]


def test_an_altered_object_is_mended_from_the_remote(home):
    """A byte turned in the cache alone costs a look at the remote, not a training."""
    model = home.perform("before")["train"].model
    cached, remote = home.objects(model)
    alter(cached)
    home.perform("mended")
    assert "train" in home.stages("receipt", "mended")
    assert cached.read_bytes() == remote.read_bytes()


def test_a_model_altered_in_the_cache_and_in_the_remote_is_made_again(home):
    """What can no longer be had intact is rebuilt: the same model, byte for byte, and the rest has receipts."""
    model = home.perform("before it")["train"].model
    weights = next(
        entry["md5"] for entry in json.loads(home.objects(model)[0].read_bytes()) if entry["relpath"] == "weights.json"
    )
    for path in home.objects(model.model_copy(update={"hash": weights})):
        alter(path)
    values = home.perform("rebuilt")
    assert values["train"].model == model
    assert [stage for stage in home.stages("stage", "rebuilt") if stage in SHARED] == ["train"]
    assert outcome(home, "rebuilt") == "unchanged"


def test_a_partition_that_is_gone_everywhere_is_read_again(home):
    """Nothing that a lost object was part of is taken over, and the source gives it once more."""
    values = home.perform("whole")
    manifest = json.loads(home.objects(values["ingest"].manifest)[0].read_bytes())
    for kind in ("cache", "remote"):
        place = home.settings.home / kind / "files" / "md5"
        md5 = manifest["partitions"][0]["object"]["hash"]
        (place / md5[:2] / md5[2:]).unlink()
    again = home.perform("read again", force=True)
    assert again["snapshot"].hash == values["snapshot"].hash
    assert outcome(home, "read again") == "unchanged"


def test_a_version_deleted_behind_our_back_is_registered_again(home):
    """MLflow is asked, not the events; the new version becomes champion, and what somebody did is recorded."""
    champion = home.champion
    for version in home.registry.versions("tide"):  # other tests may have registered this model under any of them
        home.registry._client.delete_model_version("tide", str(version.version))
    values = home.perform("deleted")
    assert "register" in home.stages("stage", "deleted")
    assert (home.champion.version, home.champion.complete) == (values["register"].version, True)
    assert home.champion.model_hash == values["train"].model.hash
    foreign = [event.body for event in home.events("promotion") if event.body["status"] == "foreign"]
    assert (foreign[-1]["expected"], foreign[-1]["champion"]) == (champion.version, None)
    assert home.visible()["unfinished runs"] == []


def test_late_rows_within_lookback_make_a_new_partition(home):
    """The period is named, the others are known, and the snapshot is another one."""
    before = home.perform("on time")
    home.write_day(11, lambda rows: pl.concat([rows, rows.head(1)]))
    values = home.perform("late")
    ingested = values["ingest"]
    assert [f"{period:%Y-%m-%d}" for period in ingested.late] == ["2024-01-12"]
    assert (ingested.partitions, ingested.known, ingested.rows) == (11, 10, 1101)
    assert "1 changed by late rows" in ingested.summary()
    assert values["snapshot"].hash != before["snapshot"].hash


def test_a_model_that_late_rows_did_not_change_is_not_registered_again(home):
    """Rows that only the hold-out has make the same model of another snapshot: nothing was learned, visibly."""
    home.perform("early")
    versions = len(home.visible()["versions"])
    home.write_day(10, lambda rows: pl.concat([rows, rows.head(2)]))
    home.perform("no news")
    assert "train" in home.stages("stage", "no news")
    assert outcome(home, "no news") == "unchanged"
    assert len(home.visible()["versions"]) == versions


def test_windows_that_moved_over_the_same_rows_are_not_taken_over(home):
    """A day given from training to validation is no new partition, and yet another training."""
    before = home.perform("windows")
    home.write(data={"train": "5d", "validation": "3d"})
    values = home.perform("other windows")
    assert values["snapshot"].hash == before["snapshot"].hash
    assert values["train"].windows == values["ingest"].windows
    assert values["train"].model != before["train"].model


def test_a_pack_that_changed_within_a_process_is_seen(home):
    """Another training function is trained by, whoever has read the old one before."""
    home.perform("old code", until="train")
    home.write_model('print("training begins")', 'print("training begins anew")')
    home.perform("new code", until="train")
    assert "train" in home.stages("stage", "new code")


def test_a_tag_deleted_by_hand_is_made_again(home):
    """A snapshot without its tag is committed again; training and what follows are not done again."""
    tag = home.perform("tagged")["snapshot"].tag
    home.git("tag", "--delete", tag)
    assert home.perform("tagged again")["snapshot"].tag == tag
    assert home.git("tag", "--list", tag) == [tag]
    assert [stage for stage in home.stages("stage", "tagged again") if stage in SHARED] == ["snapshot"]


def test_another_registry_is_given_the_version(home, tmp_path):
    """A run against another MLflow registers its model there, under the number that it has there."""
    home.perform("registered here")
    elsewhere = type(home)(home.settings.model_copy(update={"mlflow_tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}))
    assert elsewhere.perform("registered there", until="register")["register"].version == 1
    assert [version.version for version in elsewhere.registry.versions("tide")] == [1]
