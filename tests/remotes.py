"""What is in a remote, as somebody sees it who does not ask the store; and servers that hold one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from s3fs import S3FileSystem
from tests.servers import S3
from tests.web import Web

from evergreen.data.store import ATTEMPTS
from evergreen.run import Ref


def object_of(place: Path, ref: Ref) -> Path:
    return place / "files" / "md5" / ref.hash[:2] / ref.hash[2:]


class Remote:
    """The objects of a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.url = str(place)

    def read(self, ref: Ref) -> bytes | None:
        file = object_of(self.place, ref)
        return file.read_bytes() if file.exists() else None

    def write(self, ref: Ref, content: bytes) -> None:
        object_of(self.place, ref).chmod(0o644)
        object_of(self.place, ref).write_bytes(content)
        object_of(self.place, ref).chmod(0o444)

    def remove(self, ref: Ref) -> None:
        object_of(self.place, ref).unlink()

    def alter(self, ref: Ref) -> None:
        content = self.read(ref)
        assert content is not None
        self.write(ref, content[:-1] + bytes([content[-1] ^ 1]))

    def fail(self, ref: Ref) -> None:
        """Fail at the object a few times."""
        raise NotImplementedError

    def locked(self) -> AbstractContextManager[None]:
        """Nobody is known."""
        raise NotImplementedError


class Site(Remote):
    """The objects of a web server that wants a name and a password for each request; they are in the user's .netrc."""

    def __init__(self, web: Web, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(web.folder / "store")
        self.web = web
        self.url = f"{web.url}/store"
        self.netrc = folder / "netrc"
        self.netrc.write_text("machine 127.0.0.1 login me password hush\n")
        self.netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(self.netrc))
        web.needs = {"Authorization": "Basic bWU6aHVzaA=="}

    def fail(self, ref: Ref) -> None:
        self.web.ills[f"/store/files/md5/{ref.hash[:2]}/{ref.hash[2:]}"] = [403] * (ATTEMPTS - 1)

    @contextmanager
    def locked(self) -> Iterator[None]:
        self.netrc.write_text("machine 127.0.0.1 login me password not-so-secret\n")
        yield


class Bucket(Remote):
    """The objects of an S3 bucket; key and secret are in the environment."""

    def __init__(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in s3.environment().items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        self.s3 = s3
        self.bucket = s3.bucket()
        self.url = f"s3://{self.bucket}/store"

    def _key(self, ref: Ref) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"store/files/md5/{ref.hash[:2]}/{ref.hash[2:]}"}

    def read(self, ref: Ref) -> bytes | None:
        try:
            return bytes(self.s3.client().get_object(**self._key(ref))["Body"].read())
        except self.s3.client().exceptions.NoSuchKey:
            return None

    def write(self, ref: Ref, content: bytes) -> None:
        self.s3.client().put_object(**self._key(ref), Body=content)

    def remove(self, ref: Ref) -> None:
        self.s3.client().delete_object(**self._key(ref))

    def fail(self, ref: Ref) -> None:  # noqa: ARG002
        self.s3.ills = 1

    def locked(self) -> AbstractContextManager[None]:
        return self.s3.locked()
