"""The container engine behind a door: a worker may run jobs, and nothing else, without holding the engine's socket.

    python -m evergreen.training.engine --socket /run/engine/engine.sock --volume evergreen_jobs:/var/lib/jobs

speaks as much of the engine's API as `runtimes/docker.py` asks for, on a socket of its own. Nothing is passed on. What a
request asks for is read, held to what a job is, and asked anew in the words below: so what this module did not write
reaches the engine in no form, be it a key in other letters, a header, or a second request behind the first.

A job's folder lies in a volume that worker and jobs share. The worker asks for it by its path, as on a host; the engine
is asked for that part of the volume, which it opens without leaving the volume, whatever links a worker has put there.
A path on the host, however well it is looked at, could be another one a moment later.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import select
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from evergreen.settings import Settings
from evergreen.training.runtimes.docker import PIDS, SHARED_MEMORY, START, TMPFS, container_name, environment

API = "1.45"
"""The first that can mount a part of a volume. An older engine, which would mount all of it, refuses to be spoken to so."""
ENGINE = "unix:///var/run/docker.sock"
BODY_BYTES = 64 * 1024
READ_WITHIN_S = 10.0
"""How long a part of a request may take to arrive."""
LOOK_S = 1.0
"""How often whoever waits for a job's end is looked for: workers ask anew four times a second, and hang up."""
RUNNING = 8
"""How many jobs may run at once."""
CONTAINERS = 200
"""How many containers of jobs may be there, ended ones included."""
MINE = "evergreen.engine"
"""The label of what was made through this door, with the volume's name; nobody can ask for it."""

IMAGE = r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}"
CONTAINER = r"evergreen-[A-Za-z0-9._-]{1,200}|[0-9a-f]{64}"
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
USER = re.compile(r"([1-9][0-9]{0,9}):([1-9][0-9]{0,9})")
ROUTES = {
    ("ping", "GET", re.compile("/_ping")): (),
    ("ping", "HEAD", re.compile("/_ping")): (),
    ("version", "GET", re.compile("/version")): (),
    ("info", "GET", re.compile("/info")): (),
    ("image", "GET", re.compile(f"/images/({IMAGE})/json")): (),
    ("create", "POST", re.compile("/containers/create")): ("name",),
    ("inspect", "GET", re.compile(f"/containers/({CONTAINER})/json")): (),
    ("start", "POST", re.compile(f"/containers/({CONTAINER})/start")): (),
    ("wait", "POST", re.compile(f"/containers/({CONTAINER})/wait")): (),
    ("stop", "POST", re.compile(f"/containers/({CONTAINER})/stop")): ("t",),
    ("remove", "DELETE", re.compile(f"/containers/({CONTAINER})")): ("force", "v", "link"),
}
"""(what is asked, method, path without its version) → the query's names."""


class Refused(Exception):  # noqa: N818  the answer's name, not a mistake
    """A request that is not passed on, and why."""

    def __init__(self, why: str, status: int = 403) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Rules:
    """What jobs may have."""

    volume: str
    """The engine's name for what the jobs' folders lie in."""
    at: PurePosixPath
    """Where workers have it, and so jobs."""
    images: tuple[str, ...]
    """Patterns of ids, tags and digests."""
    memory_bytes: int
    cpus: float


@dataclass(frozen=True)
class Ask:
    """A request that may be made, if the engine knows what it names as one of ours."""

    what: str
    of: str = ""
    """An image, or a container by name or id."""
    seconds: int = 0
    """Of grace, for `stop`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """For `create`: in the engine's words, all of it ours."""


def decide(method: str, target: str, body: bytes, rules: Rules) -> Ask:
    """What is asked for. Raises Refused for all that running a job does not need."""
    try:
        url = urlsplit(target)
    except ValueError as error:
        raise Refused(f"{target} is no address", 400) from error
    path = re.sub(r"^/v1\.[0-9]{1,3}(?=/)", "", unquote(url.path))
    for (what, wanted, pattern), names in ROUTES.items():
        found = pattern.fullmatch(path)
        if not found or wanted != method:
            continue
        query = parse_qsl(url.query, keep_blank_values=True)
        if len(dict(query)) < len(query) or not dict(query).keys() <= set(names):
            raise Refused(f"{method} {path} takes no such query")
        told = dict(query)
        if what == "create":
            name = told.get("name", "")
            try:
                return Ask(what, of=name, config=container(name, _json(body), rules))
            except RecursionError as error:
                raise Refused("the body is too deep", 400) from error
        if body.strip() not in (b"", b"{}", b"null"):
            raise Refused(f"{method} {path} takes no body")
        if not re.fullmatch("[0-9]{0,3}", told.get("t", "")):
            raise Refused("a grace is a number of seconds below 1000")
        return Ask(what, of=found[1] if found.groups() else "", seconds=int(told.get("t") or 10))
    if (method, path) == ("POST", "/images/create"):
        raise Refused("images are not pulled from here: pull it on the machine whose engine this is")
    raise Refused(f"{method} {path} is nothing that running a job needs")


def container(name: str, asked: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """The container of the job that is asked for. Raises Refused where anything in it is not a job's.

    A job's container differs from another's in its folder, image, user, environment, limits and GPUs; these are taken
    from what is asked, within the rules. With them the request that `runtimes/docker.py` makes is put together, and what
    is asked must be that, up to keys that say nothing.
    """
    host = asked.get("HostConfig")
    host = _telling(host if isinstance(host, dict) else {})
    told = _telling({**asked, "HostConfig": host, "Volumes": None})
    folder = _folder(told.get("WorkingDir"), rules)
    if name != container_name(Path(folder)):
        raise Refused(f"the container of {folder} is called {container_name(Path(folder))}")
    image = _matching(told, "Image", re.compile(IMAGE))
    user = _matching(told, "User", USER)
    if max(int(number) for number in user.split(":")) >= 2**31:
        raise Refused(f"User {user} is no user")
    labels = {"evergreen.job": folder.name, "evergreen.pack": _matching(told.get("Labels"), "evergreen.pack", PART)}
    free = {
        "Image": image,
        "User": user,
        "Env": _environment(told.get("Env")),
        "Entrypoint": ["sh", "-c", START],
        "Cmd": [str(folder)],
        "WorkingDir": str(folder),
    }
    memory = _most(host, "Memory", rules.memory_bytes)
    limits = {
        "Memory": memory,
        "MemorySwap": memory,
        "NanoCpus": _most(host, "NanoCpus", int(rules.cpus * 1e9)),
        "PidsLimit": PIDS,
        "ShmSize": SHARED_MEMORY,
        "NetworkMode": "none",
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true"],
        "Tmpfs": dict(TMPFS),
        "LogConfig": {"Type": "none", "Config": {}},
        "Init": True,
    }
    gpus = _gpus(host.get("DeviceRequests"))
    shared = {"Binds": [f"{folder}:{folder}", f"{folder}/input:{folder}/input:ro"]}
    named: dict[str, Any] = {str(folder): {}, f"{folder}/input": {}}  # docker-py says so where the binds lead
    if asked.get("Volumes") not in (None, {}, named):
        raise Refused(f"Volumes is {_short(asked['Volumes'])}: a job has its folder and nothing else")
    part = str(folder.relative_to(rules.at))
    mounts = [_mount(rules.volume, part, folder), _mount(rules.volume, f"{part}/input", folder / "input", ro=True)]
    _same(told, {**free, "Labels": labels, "HostConfig": {**limits, **shared, **gpus}})
    return {
        **free,
        "Labels": {**labels, MINE: rules.volume},
        "HostConfig": {**limits, "Mounts": mounts, **gpus},
    }


def _json(body: bytes) -> dict[str, Any]:
    """A request's body. Go's decoder takes `privileged` for `Privileged`, and the last of two: neither is let through."""

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        known = [key.casefold() for key, _ in pairs]
        if len(set(known)) < len(known):
            raise Refused(f"a key is there twice among {', '.join(sorted(known))[:200]}")
        return dict(pairs)

    try:
        found = json.loads(body, object_pairs_hook=once)
    except ValueError as error:
        raise Refused(f"the body is no JSON: {error}", 400) from error
    if not isinstance(found, dict):
        raise Refused("the body is no JSON object", 400)
    return found


def _telling(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys whose values say nothing: null, false, nothing in it."""
    return {
        key: value
        for key, value in asked.items()
        if value is not None and value is not False and value not in ("", [], {})
    }


def _same(asked: Mapping[str, Any], made: Mapping[str, Any], within: str = "") -> None:
    """Raise Refused where `asked` is not `made`, naming the first difference."""
    for key in sorted(asked.keys() | made.keys()):
        ours, theirs = made.get(key), asked.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            _same(theirs, ours, f"{within}{key}.")
        elif key not in asked:
            raise Refused(f"{within}{key} is missing: a job has {_short(ours)}")
        elif key not in made:
            raise Refused(f"{within}{key} is {_short(theirs)}: a job has none")
        elif ours != theirs:
            raise Refused(f"{within}{key} is {_short(theirs)}: a job has {_short(ours)}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _folder(value: Any, rules: Rules) -> PurePosixPath:
    """The job's folder: plain names, below where the volume is."""
    folder = PurePosixPath(value) if isinstance(value, str) else None
    if folder is None or str(folder) != value or rules.at not in folder.parents:
        raise Refused(f"WorkingDir is {_short(value)}: a job's folder is below {rules.at}")
    if not all(PART.fullmatch(part) for part in folder.relative_to(rules.at).parts):
        raise Refused(f"WorkingDir is {_short(value)}: of letters, digits, dot, dash and underscore")
    return folder


def _matching(told: Any, key: str, pattern: re.Pattern[str]) -> str:
    value = told.get(key) if isinstance(told, dict) else None
    if not isinstance(value, str) or not pattern.fullmatch(value):
        what = "a user and a group by number, neither root" if key == "User" else f"like {pattern.pattern}"
        raise Refused(f"{key} is {_short(value)}: a job has one {what}")
    return value


def _environment(value: Any) -> list[str]:
    """What `runtimes/docker.py` gives a job of its own environment, which leaves out what loads code, and settings."""
    listed = value if isinstance(value, list) and all(isinstance(line, str) and "=" in line for line in value) else []
    pairs = dict(line.split("=", 1) for line in listed)
    if len(pairs) != len(listed) or environment(pairs) != pairs:
        kept = environment(pairs)
        names = sorted(name for name in pairs.keys() | kept.keys() if pairs.get(name) != kept.get(name))
        raise Refused(f"Env is not a job's: {_short(names or value)}")
    return listed


def _most(host: Mapping[str, Any], key: str, most: int) -> int:
    value = host.get(key)
    if type(value) is not int or not 0 < value <= most:
        raise Refused(f"HostConfig.{key} is {_short(value)}: a job has at most {most}")
    return value


def _gpus(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    count = value[0].get("Count") if isinstance(value, list) and value and isinstance(value[0], dict) else None
    if type(count) is not int or not (count == -1 or 0 < count <= 64):
        raise Refused(f"HostConfig.DeviceRequests is {_short(value)}: a job has GPUs, by number, or no device")
    return {
        "DeviceRequests": [{"Driver": "", "Count": count, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}]
    }


def _mount(volume: str, part: str, at: PurePosixPath, *, ro: bool = False) -> dict[str, Any]:
    return {
        "Type": "volume",
        "Source": volume,
        "Target": str(at),
        "ReadOnly": ro,
        "VolumeOptions": {"NoCopy": True, "Subpath": part},
    }


class Door(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """The socket that workers have, which only this user can open."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path: Path, rules: Rules, engine: str = ENGINE) -> None:
        self.rules = rules
        self.engine = engine
        self.counting = threading.Lock()
        path.unlink(missing_ok=True)  # of one that was killed
        before = os.umask(0o177)
        try:
            super().__init__(str(path), Visitor)
        finally:
            os.umask(before)

    @contextmanager
    def asking(self) -> Iterator[Any]:
        """The engine itself. Raises Refused with what it says where it will not, or is not there."""
        import docker
        import docker.errors
        import requests

        client = docker.APIClient(base_url=self.engine, version=API)
        try:
            yield client
        except docker.errors.APIError as error:
            status = error.response.status_code if error.response is not None else 502
            raise Refused(str(error.explanation or error), status) from error
        except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
            raise Refused(f"the engine does not answer: {error}", 502) from error
        finally:
            client.close()


class Visitor(BaseHTTPRequestHandler):
    """One request, and then the connection is closed."""

    server: Door
    timeout = READ_WITHIN_S

    def handle_one_request(self) -> None:
        """Whatever the method; HTTP/1.0, which this class speaks, has one to a connection."""
        try:
            self.raw_requestline = self.rfile.readline(BODY_BYTES)
            if not self.raw_requestline or not self.parse_request():
                return
            try:
                ask = decide(self.command, self.path, self._body(), self.server.rules)
                with self.server.asking() as engine:
                    status, answer = self._of_the_engine(engine, ask) or self._of_a_job(engine, ask)
            except Refused as refused:
                self.log_message("%s: %s", refused.status, refused)
                status, answer = refused.status, {"message": str(refused)}
            else:
                if ask.what in ("create", "start", "stop", "remove"):
                    self.log_message("%s %s", ask.what, ask.of)
            self._answer(status, answer)
        except (TimeoutError, ConnectionError):  # whoever asked is slow, or gone
            return

    def _body(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        if self.headers.get_all("Transfer-Encoding") or self.headers.get_all("Upgrade"):
            raise Refused("a request has a length, no encoding, and stays HTTP")
        if not lengths:
            return b""
        if len(lengths) > 1 or not re.fullmatch("[0-9]{1,9}", lengths[0]):
            raise Refused("a request has one length")
        if int(lengths[0]) > BODY_BYTES:
            raise Refused(f"a body has at most {BODY_BYTES} bytes", 413)
        body = self.rfile.read(int(lengths[0]))
        if len(body) < int(lengths[0]):
            raise Refused("the body is shorter than it says", 400)
        return body

    def _of_the_engine(self, engine: Any, ask: Ask) -> tuple[int, Any] | None:
        """The answer to what is asked of no container that is there."""
        rules = self.server.rules
        match ask.what:
            case "ping":
                engine.ping()
                return 200, "OK"
            case "version":
                return 200, {"ApiVersion": API, "MinAPIVersion": API, "Version": engine.version()["Version"]}
            case "info":
                told = engine.info()
                runtimes: dict[str, Any] = {name: {} for name in told.get("Runtimes") or ()}
                return 200, {"NCPU": min(told["NCPU"], rules.cpus), "Runtimes": runtimes}
            case "image":
                found = _image(engine, ask.of, rules)
                return 200, {key: found.get(key) for key in ("Id", "RepoTags", "RepoDigests")}
            case "create":
                image = _image(engine, ask.config["Image"], rules)["Id"]
                mine = {"label": f"{MINE}={rules.volume}"}
                with self.server.counting:
                    if len(engine.containers(all=True, filters=mine)) >= CONTAINERS:
                        raise Refused(
                            f"{CONTAINERS} containers of jobs are there already; on the machine whose engine this is: "
                            f"docker container prune --filter label={mine['label']}"
                        )
                    made = engine.create_container_from_config({**ask.config, "Image": image}, name=ask.of)
                return 201, {"Id": made["Id"], "Warnings": []}
        return None

    def _of_a_job(self, engine: Any, ask: Ask) -> tuple[int, Any]:
        """The answer to what is asked of a container that was made through this door."""
        told = engine.inspect_container(ask.of)
        volume = self.server.rules.volume
        marked = (told["Config"].get("Labels") or {}).get(MINE) == volume  # which an image can give, too
        if not marked or volume not in [mount.get("Name") for mount in told.get("Mounts") or ()]:
            raise Refused(f"container {ask.of} is no job's of this door")
        its_id = told["Id"]  # its name may be another's by now
        if ask.what == "inspect":
            return 200, {key: told[key] for key in ("Id", "Name", "Created", "State", "Image")}
        if ask.what == "wait":
            return 200, self._waited(engine, its_id)
        if ask.what == "start":
            with self.server.counting:
                if len(engine.containers(filters={"label": f"{MINE}={volume}"})) >= RUNNING:
                    raise Refused(f"{RUNNING} jobs run already")
                engine.start(its_id)
        elif ask.what == "stop":
            engine.stop(its_id, timeout=ask.seconds)
        elif ask.what == "remove":
            engine.remove_container(its_id, force=True, v=True)
        return 204, None

    def _waited(self, engine: Any, container_id: str) -> Any:
        """The container's end, for as long as somebody wants to know."""
        import requests

        while True:
            with suppress(requests.exceptions.Timeout, requests.exceptions.ConnectionError):  # how a wait says: not yet
                return engine.wait(container_id, timeout=LOOK_S)
            engine.ping()  # or the same, at once and for ever, of one that is away
            heard, _, _ = select.select([self.connection], [], [], 0)
            if heard and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError

    def _answer(self, status: int, answer: Any) -> None:
        content = b"" if answer is None else answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Api-Version", API)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(content)

    def address_string(self) -> str:
        return "worker"


def _image(engine: Any, asked: str, rules: Rules) -> Any:
    """The image, if it is one of those allowed: by its id, or by a tag or digest that it has."""
    found = engine.inspect_image(asked)
    names = [found["Id"], *(found.get("RepoTags") or ()), *(found.get("RepoDigests") or ())]
    if not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in rules.images):
        raise Refused(
            f"image {asked} is not one that jobs may run in: {', '.join(rules.images)}; ENGINE_IMAGES says which are"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until told to end."""
    told = argparse.ArgumentParser(description="A door to the container engine, wide enough for jobs.")
    told.add_argument("--socket", type=Path, required=True, help="where workers find it")
    told.add_argument("--engine", default=ENGINE, help="the engine's own socket")
    told.add_argument(
        "--volume", required=True, help="NAME:PATH, the volume of the jobs' folders and where workers have it"
    )
    told.add_argument("--images", default="", help="patterns of images besides EVERGREEN_IMAGE, by commas")
    told.add_argument("--memory", type=int, default=8, help="GiB that a job may have")
    told.add_argument("--cpus", type=float, default=4.0, help="CPUs that a job may have")
    given = told.parse_args(arguments)
    volume, _, at = given.volume.partition(":")
    own = Settings.from_env().image
    rules = Rules(
        volume=volume,
        at=PurePosixPath(at),
        images=tuple(pattern for pattern in map(str.strip, (own or "", *given.images.split(","))) if pattern),
        memory_bytes=given.memory * 2**30,
        cpus=given.cpus,
    )
    if not (volume and rules.at.is_absolute()):
        told.error("--volume is NAME:PATH, with an absolute path")
    with Door(given.socket, rules, given.engine) as door:
        sys.stderr.write(f"jobs in {volume}, of {', '.join(rules.images)}: {given.socket}\n")
        door.serve_forever()


if __name__ == "__main__":
    main()
