"""The door to the container engine, as those who would go further than a job meet it."""

import http.client
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import docker as docker_client
import pytest

import evergreen
from evergreen.errors import JobError
from evergreen.training import engine
from evergreen.training.runtimes import docker
from evergreen.training.runtimes.docker import START, container_name

SLEEP = "import time\ndef read(window):\n    time.sleep(600)\n    yield None\n"


class Unix(http.client.HTTPConnection):
    """HTTP by a socket in the file system."""

    def __init__(self, path):
        super().__init__("localhost", timeout=60)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self.path)


def ask(path, method, target, body=None):
    """The status and what is said, of a request by the socket at `path`."""
    connection = Unix(path)
    connection.request(method, target, body=None if body is None else json.dumps(body))
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content)["message"] if answer.status >= 400 else content


def send(path, *lines, body=b""):
    """The first line of the answer to a request, byte by byte."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        connection.sendall("\r\n".join((*lines, "", "")).encode() + body)
        with connection.makefile("rb") as answer:
            return answer.readline().decode().strip()


def job(folder, image):
    """The name and the request of the job in `folder`."""
    kept = docker.environment({})
    return container_name(Path(folder)), {
        "User": "65534:65534",
        "Env": [f"{key}={value}" for key, value in kept.items()],
        "Entrypoint": ["sh", "-c", START],
        "Cmd": [str(folder)],
        "Image": image,
        "WorkingDir": str(folder),
        "Labels": {"evergreen.job": Path(folder).name, "evergreen.pack": "demo"},
        "HostConfig": {
            "Binds": [f"{folder}:{folder}", f"{folder}/input:{folder}/input:ro"],
            "NetworkMode": "none",
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges:true"],
            "Memory": 2**29,
            "MemorySwap": 2**29,
            "NanoCpus": 1_000_000_000,
            "PidsLimit": 4096,
            "ShmSize": 2**30,
            "Tmpfs": {"/tmp": "rw,nosuid,nodev,mode=1777"},
            "LogConfig": {"Type": "none", "Config": {}},
            "Init": True,
        },
    }


@contextmanager
def served(path, rules, at):
    """A door in this process, to the engine that is `at` this URL."""
    with engine.Door(path, rules, at) as door:
        serving = threading.Thread(target=door.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            yield path
        finally:
            door.shutdown()
            serving.join()


@pytest.fixture
def watched(between):
    """The same, not spoken to yet."""
    between[1].clear()
    return between


@pytest.fixture(scope="module")
def between(tmp_path_factory):
    """A door, and how often whoever stands behind it in the engine's place was spoken to."""
    folder = tmp_path_factory.mktemp("watched")
    calls = []
    with socket.socket(socket.AF_UNIX) as behind:
        behind.bind(str(folder / "behind.sock"))
        behind.listen()

        def count():
            while True:
                try:
                    visitor, _ = behind.accept()
                except OSError:
                    return
                calls.append(visitor.recv(1000))
                visitor.close()

        counting = threading.Thread(target=count)
        counting.start()
        rules = engine.Rules("jobs", PurePosixPath("/var/lib/jobs"), ("*",), 2**33, 4.0)
        with served(folder / "engine.sock", rules, f"unix://{folder}/behind.sock") as path:
            yield path, calls
        behind.shutdown(socket.SHUT_RDWR)
        counting.join()


FOLDER = "/var/lib/jobs/evergreen/a"
NAME, JOB = job(FOLDER, "evergreen:1")
CREATE = f"/v1.45/containers/create?name={NAME}"


def test_a_job_reaches_the_engine(watched):
    """So that what follows tells refusals from a door that is shut."""
    path, calls = watched
    status, said = ask(path, "POST", CREATE, JOB)
    assert (status, len(calls)) == (502, 1)
    assert "the engine does not answer" in said
    assert calls[0].startswith(b"GET /v1.45/images/evergreen:1/json ")


BINDS = JOB["HostConfig"]["Binds"]
HOSTILE = {
    "privileged": {"Privileged": True},
    "privileged in lower case": {"privileged": True},
    "privileged by a number": {"Privileged": 1},
    "the machine's root": {"Binds": ["/:/host"]},
    "the machine's root beside the folder": {"Binds": [*BINDS, "/:/host"]},
    "up and away": {"Binds": [f"{FOLDER}/../../../..:{FOLDER}", BINDS[1]]},
    "another's folder": {"Binds": [BINDS[0].replace("a:", "b:"), BINDS[1]]},
    "the input for writing": {"Binds": [BINDS[0], BINDS[1].removesuffix(":ro")]},
    "shared propagation": {"Binds": [BINDS[0] + ":rshared", BINDS[1]]},
    "the engine's socket": {"Binds": [*BINDS, "/var/run/docker.sock:/x"]},
    "binds in lower case": {"binds": ["/:/host"]},
    "a mount": {"Mounts": [{"Type": "bind", "Source": "/", "Target": "/host"}]},
    "another's volumes": {"VolumesFrom": ["evergreen-store-1"]},
    "a volume driver": {"VolumeDriver": "x"},
    "the machine's network": {"NetworkMode": "host"},
    "another's network": {"NetworkMode": "container:evergreen-postgres-1"},
    "a network": {"NetworkMode": "bridge"},
    "a published port": {"PortBindings": {"80/tcp": [{"HostPort": "80"}]}},
    "the machine's processes": {"PidMode": "host"},
    "the machine's memory": {"IpcMode": "host"},
    "the machine's users": {"UsernsMode": "host"},
    "the machine's name": {"UTSMode": "host"},
    "the machine's groups of processes": {"CgroupnsMode": "host", "CgroupParent": "/"},
    "a device": {"Devices": [{"PathOnHost": "/dev/sda", "PathInContainer": "/dev/sda", "CgroupPermissions": "rwm"}]},
    "devices by rule": {"DeviceCgroupRules": ["b *:* rwm"]},
    "devices by another driver": {"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["x/y=z"], "Count": 1}]},
    "options of a device": {
        "DeviceRequests": [{"Driver": "", "Count": 1, "Capabilities": [["gpu"]], "Options": {"a": "b"}}]
    },
    "a capability": {"CapAdd": ["SYS_ADMIN"]},
    "capabilities kept": {"CapDrop": []},
    "new privileges": {"SecurityOpt": []},
    "no seccomp": {"SecurityOpt": ["no-new-privileges:true", "seccomp=unconfined"]},
    "unmasked paths": {"MaskedPaths": ["/x"]},
    "a root to write to": {"ReadonlyRootfs": False},
    "a kernel's setting": {"Sysctls": {"kernel.shm_rmid_forced": "1"}},
    "another runtime": {"Runtime": "x"},
    "another log": {"LogConfig": {"Type": "syslog", "Config": {"syslog-address": "udp://10.0.0.1"}}},
    "more memory": {"Memory": 2**34, "MemorySwap": 2**34},
    "memory without end": {"Memory": 0, "MemorySwap": 0},
    "swap without end": {"MemorySwap": -1},
    "more CPUs": {"NanoCpus": 5_000_000_000},
    "CPUs without end": {"NanoCpus": 0},
    "processes without end": {"PidsLimit": -1},
    "no OOM killer": {"OomKillDisable": True},
    "a group": {"GroupAdd": ["0"]},
    "for ever": {"RestartPolicy": {"Name": "always"}},
    "another /tmp": {"Tmpfs": {"/tmp": "rw,exec,suid,dev"}},
    "what is not known yet": {"SomethingNew": "x"},
}
BESIDE = {
    "root": {"User": "0:0"},
    "root's group": {"User": "65534:0"},
    "root by name": {"User": "root"},
    "root by saying nothing": {"User": ""},
    "root by a number too large": {"User": f"{2**32}:{2**32}"},
    "root by a line more": {"User": "1:1\n"},
    "another entry": {"Entrypoint": ["/bin/sh"]},
    "another command": {"Cmd": ["x"]},
    "code to be loaded": {"Env": [*JOB["Env"], "LD_PRELOAD=/var/lib/jobs/evergreen/a/x.so"]},
    "GPUs by a variable": {"Env": [*JOB["Env"], "NVIDIA_VISIBLE_DEVICES=all"]},
    "a secret": {"Env": [*JOB["Env"], "AWS_SECRET_ACCESS_KEY=x"]},
    "a variable twice": {"Env": [*JOB["Env"], JOB["Env"][0]]},
    "the door's own mark": {"Labels": {**JOB["Labels"], "evergreen.engine": "other"}},
    "a stack's mark": {"Labels": {**JOB["Labels"], "com.docker.compose.project": "evergreen"}},
    "an image that is a path": {"Image": "a/../../containers/b"},
    "a volume": {"Volumes": {"/x": {}}},
    "a network in so many words": {"NetworkingConfig": {"EndpointsConfig": {"bridge": {}}}},
    "a health check": {"Healthcheck": {"Test": ["CMD", "x"]}},
    "a folder elsewhere": {"WorkingDir": "/etc"},
    "no HostConfig": {"HostConfig": None},
    "another HostConfig": {"hostconfig": {"Privileged": True}},
}


@pytest.mark.parametrize(
    "body",
    [*({**JOB, "HostConfig": {**JOB["HostConfig"], **more}} for more in HOSTILE.values()), *({**JOB, **more} for more in BESIDE.values())],
    ids=[*HOSTILE, *BESIDE],
)  # fmt: skip
def test_what_is_not_a_jobs_is_refused(watched, body):
    """With a sentence, and without a word to the engine."""
    path, calls = watched
    status, said = ask(path, "POST", CREATE, body)
    assert (status, calls) == (403, [])
    assert len(said) > 20


@pytest.mark.parametrize("name", ["", "x", "evergreen-worker-1", "evergreen-a-00000000", "../x"])
def test_a_container_has_its_folders_name(watched, name):
    """No other, so that none is in another's place."""
    path, calls = watched
    status, said = ask(path, "POST", f"/containers/create?name={name}", JOB)
    assert (status, calls) == (403, [])
    assert NAME in said


ID = "a" * 64


@pytest.mark.parametrize(
    "line",
    [
        f"POST /v1.45/containers/{ID}/exec",
        f"POST /exec/{ID}/start",
        "GET /containers/json",
        f"GET /containers/{ID}/logs",
        f"GET /containers/{ID}/archive?path=/",
        f"PUT /containers/{ID}/archive?path=/",
        f"GET /containers/{ID}/export",
        f"POST /containers/{ID}/attach",
        f"POST /containers/{ID}/update",
        f"POST /containers/{ID}/rename?name=x",
        f"POST /containers/{ID}/restart",
        f"POST /containers/{ID}/kill",
        "POST /containers/postgres/stop",
        f"POST /containers/{ID}/stop?t=-1",
        f"POST /containers/{ID}/stop?t=1&t=2",
        f"POST /containers/{ID}/stop?signal=KILL",
        f"GET /containers/{ID}/../../info/json",
        "GET /containers/evergreen-x%2f..%2f..%2finfo/json",
        f"GET //containers/{ID}/json?x=1",
        f"POST {CREATE}&platform=linux/arm64",
        "POST /images/create?fromImage=x",
        "POST /images/x/push",
        "DELETE /images/evergreen:1",
        "GET /images/json",
        "GET /images/a/../../containers/b/json",
        "POST /build",
        "POST /commit?container=x",
        "POST /volumes/create",
        "GET /volumes",
        "POST /networks/create",
        "POST /plugins/pull",
        "POST /swarm/init",
        "GET /events",
        "GET /system/df",
        "POST /auth",
        "POST /session",
        "POST /grpc",
        "PATCH /info",
        "OPTIONS *",
        "GET /debug/pprof/",
        "GET /v1.45",
        "GET /",
    ],
)
def test_what_running_a_job_does_not_need_is_refused(watched, line):
    """Commands in containers, files, logs, pulls, builds, networks, volumes, and whatever else an engine can do."""
    path, calls = watched
    method, target = line.split(" ")
    status, said = ask(path, method, target)
    assert (status, calls) == (403, [])
    assert said


TEXT = json.dumps(JOB).encode()
BEHIND = f"POST /v1.45/containers/{ID}/exec HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        (["Transfer-Encoding: chunked"], b"%x\r\n%s\r\n0\r\n\r\n" % (len(TEXT), TEXT), 403),
        (["Transfer-Encoding: chunked", f"Content-Length: {len(TEXT)}"], TEXT, 403),
        (["Content-Length: 4", f"Content-Length: {len(TEXT)}"], TEXT, 403),
        (["Content-Length: +5"], TEXT, 403),
        (["Content-Length: -1"], TEXT, 403),
        (["Content-Length: 70000"], b"x" * 70000, 413),
        (["Content-Length: 999999999"], b"", 413),
        (["Connection: Upgrade", "Upgrade: tcp", f"Content-Length: {len(TEXT)}"], TEXT, 403),
        ([f"Content-Length: {len(TEXT) - 5}"], TEXT, 400),
        (["Content-Length: 2"], b"{}" + BEHIND, 403),
        ([f"Content-Length: {len(TEXT) + 1}"], b'{"HostConfig": {"Privileged": true}, ' + TEXT[1:], 400),
        ([f"Content-Length: {len(TEXT)}"], b"[" * len(TEXT), 400),
        (["Content-Length: 60000"], b'{"HostConfig":' * 4000 + b"x" * 4000, 400),
        (["Content-Length: 2"], b"[]", 400),
        (["Content-Length: 2"], b"\xff\xfe", 400),
        ([], b"", 400),
    ],
    ids=["chunked", "both", "two lengths", "plus", "minus", "oversize", "said oversize", "upgrade", "short", "one behind",
         "cut", "deep list", "deep object", "list", "no text", "nothing"],
)  # fmt: skip
def test_a_request_that_could_be_read_in_two_ways_is_refused(watched, headers, body, status):
    """The engine is never told of it, so it cannot read it in another."""
    path, calls = watched
    line = send(path, f"POST {CREATE} HTTP/1.1", "Host: x", *headers, body=body)
    assert (line.split()[1], calls) == (str(status), [])


def test_a_second_request_behind_the_first_is_not_read(watched):
    """A connection is good for one."""
    path, calls = watched
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        connection.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n" + BEHIND)
        with connection.makefile("rb") as answer:
            assert answer.read().count(b"HTTP/1.") == 1
    assert calls == []


def test_the_socket_is_its_users_alone(watched):
    """Nobody else of the machine asks for anything."""
    assert watched[0].stat().st_mode & 0o777 == 0o600


@pytest.fixture
def real(door, tmp_path, image):
    """The engine itself, the door to it, and the request of a job in a folder of this test's."""
    folder = tmp_path / "job"
    (folder / "input" / "pack").mkdir(parents=True)
    (folder / "input" / "pack" / "model.py").write_text(SLEEP)
    told = {"id": "job", "kind": "read", "pack": "demo", "call": "model:read", "timeout_s": 60, "gpus": 0}
    container = {"container": {"image": image, "memory_bytes": 2**29, "cpus": 1}}
    (folder / "job.json").write_text(
        json.dumps(told | container | {"target": "y", "event_time": "t", "task": "binary"})
    )
    client = docker_client.from_env()
    yield client, door, folder
    client.close()


def test_another_container_is_out_of_reach(real, image):
    """One that bears a job's name and labels, but was not made by the door, can neither be seen, ended nor removed."""
    client, door, _ = real
    name = f"evergreen-test-{uuid.uuid4().hex[:8]}"
    labels = {"evergreen.job": "a", "evergreen.engine": "another"}
    victim = client.containers.run(image, ["sleep", "60"], name=name, labels=labels, detach=True, network_mode="none")
    try:
        for known in (name, victim.id):
            for method, path in (
                ("GET", "/json"),
                ("POST", "/stop?t=0"),
                ("POST", "/wait"),
                ("POST", "/start"),
                ("DELETE", "?force=True"),
            ):
                status, said = ask(door, method, f"/v1.45/containers/{known}{path}")
                assert (status, said) == (403, f"container {known} is no job's of this door")
        victim.reload()
        assert victim.status == "running"
    finally:
        victim.remove(force=True)


def test_a_label_that_came_by_an_image_is_no_mark(real, here, image):
    """A container that bears the door's own label, and has nothing of the volume, is none of its own."""
    client, _, _ = real
    docker.launch(here)
    name = f"evergreen-test-{uuid.uuid4().hex[:8]}"
    labels = client.containers.get(container_name(here)).labels
    victim = client.containers.create(image, ["sleep", "60"], name=name, labels=labels, network_mode="none")
    try:
        status, said = ask(here.parent / "own.sock", "DELETE", f"/containers/{name}?force=True")
        assert (status, said) == (403, f"container {name} is no job's of this door")
    finally:
        victim.remove(force=True)


def test_another_image_is_out_of_reach(real):
    """It is neither looked at nor run, and the error says which are: however their list was spaced."""
    client, door, folder = real
    other, _ = client.images.build(fileobj=None, path=str(_recipe(folder)), rm=True)
    try:
        name, request = job(folder, other.id)
        for status, said in (
            ask(door, "GET", f"/images/{other.id}/json"),
            ask(door, "POST", f"/containers/create?name={name}", request),
        ):
            assert status == 403
            assert ", churn:*, other:*; ENGINE_IMAGES says which" in said
        assert not client.containers.list(all=True, filters={"name": name})
    finally:
        client.images.remove(other.id, force=True)


def _recipe(folder):
    (folder / "recipe").mkdir()
    (folder / "recipe" / "Dockerfile").write_text(f"FROM scratch\nLABEL evergreen.test={uuid.uuid4().hex}\n")
    return folder / "recipe"


def test_a_link_in_the_folders_place_leads_nowhere(real, image):
    """Where a worker puts a link to the machine's own folders, the engine finds nothing: it stays in the volume."""
    client, door, folder = real
    name, request = job(folder, image)
    folder.rename(folder.with_name("away"))
    folder.symlink_to("/etc")
    status, said = ask(door, "POST", f"/containers/create?name={name}", request)
    if status == 201:
        status, said = ask(door, "POST", f"/containers/{name}/start")
    assert status >= 400, said
    assert not client.containers.list(filters={"name": name})


@pytest.fixture
def here(real, image, monkeypatch):
    """A door to the real engine in this process, and the folder of a job."""
    client, _, folder = real
    where = {"type": "none", "o": "bind", "device": str(folder.parent)}
    volume = client.volumes.create(f"evergreen-test-{uuid.uuid4().hex[:12]}", driver="local", driver_opts=where)
    rules = engine.Rules(volume.name, PurePosixPath(folder.parent), (image,), 2**30, 1.0)
    with served(folder.parent / "own.sock", rules, os.environ.get("DOCKER_HOST", engine.ENGINE)) as path:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        yield folder
        docker.stop(folder, grace_s=0)
    volume.remove()


def test_only_so_many_jobs_run_at_once(here, monkeypatch):
    """One more is refused, and it says why."""
    monkeypatch.setattr(engine, "RUNNING", 0)
    with pytest.raises(JobError, match="0 jobs run already"):
        docker.launch(here)
    monkeypatch.setattr(engine, "RUNNING", 1)
    docker.launch(here)
    assert docker.alive(here)


def test_only_so_many_containers_are_made(here, monkeypatch):
    """Those that have ended count, too; one more is refused, and it says why."""
    monkeypatch.setattr(engine, "CONTAINERS", 0)
    with pytest.raises(JobError, match="0 containers of jobs are there already"):
        docker.launch(here)


def test_who_waits_no_more_is_forgotten(here):
    """A worker asks anew four times a second, for hours: nothing of it is left at the door."""
    docker.launch(here)
    before = threading.active_count()
    for _ in range(10):
        assert not docker.join(here, timeout_s=0.01)
    deadline = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("compose")
def test_of_the_stacks_services_the_door_alone_has_the_engines_socket(tmp_path):
    """By the overlay, and without a network; `worker-gpu` alone can ask it, and the stack as it is has no door at all."""
    project = Path(evergreen.__file__).parents[2]
    (tmp_path / "image.env").touch()
    found = {}
    for overlays in ((), ("engine",), ("gpu", "engine")):
        files = ["docker-compose.yaml", *(f"docker-compose.{overlay}.yaml" for overlay in overlays)]
        told = subprocess.run(
            ["docker", "compose", *(f"--file={name}" for name in files), "config", "--format", "json"],
            cwd=project,
            env={**os.environ, "EVERGREEN_SECRETS": str(tmp_path), "DOCKER_GROUP": "123"},
            capture_output=True,
            check=True,
        )
        services = json.loads(told.stdout)["services"]
        found[overlays] = {
            (mount["source"].rpartition("/")[2], name, mount.get("read_only", False))
            for name, service in services.items()
            for mount in service.get("volumes", ())
            if mount.get("source", "").endswith(("docker.sock", "engine"))
        }
    assert found.pop(()) == set()
    every = {("docker.sock", "engine", False), ("engine", "engine", False), ("engine", "worker-gpu", True)}
    assert list(found.values()) == [every, every]
    assert services["engine"]["network_mode"] == "none"
    assert services["engine"]["group_add"] == ["123"]
    assert (services["engine"]["read_only"], services["engine"]["cap_drop"]) == (True, ["ALL"])
