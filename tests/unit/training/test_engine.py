"""What may be asked of the container engine: a pure decision, and what it lets through is written anew."""

import copy
import json
from contextlib import suppress
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evergreen.training.engine import Refused, Rules, container, decide
from evergreen.training.runtimes.docker import START, container_name

RULES = Rules(volume="jobs", at=PurePosixPath("/var/lib/jobs"), images=("*",), memory_bytes=2**33, cpus=4.0)
FOLDER = PurePosixPath("/var/lib/jobs/evergreen/train-digits-0123")
NAME = container_name(FOLDER)
JOB = {
    "Hostname": None,
    "User": "1000:1000",
    "Tty": False,
    "OpenStdin": False,
    "AttachStdout": False,
    "Env": ["HOME=/tmp", "PYTHONHASHSEED=0", "CUBLAS_WORKSPACE_CONFIG=:4096:8", "PYTHONUNBUFFERED=1"],
    "Entrypoint": ["sh", "-c", START],
    "Cmd": [str(FOLDER)],
    "Image": "sha256:" + "a" * 64,
    "WorkingDir": str(FOLDER),
    "Volumes": {str(FOLDER): {}, f"{FOLDER}/input": {}},
    "Labels": {"evergreen.job": FOLDER.name, "evergreen.pack": "digits"},
    "HostConfig": {
        "Binds": [f"{FOLDER}:{FOLDER}", f"{FOLDER}/input:{FOLDER}/input:ro"],
        "NetworkMode": "none",
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true"],
        "Memory": 2**32,
        "MemorySwap": 2**32,
        "NanoCpus": 2_000_000_000,
        "PidsLimit": 4096,
        "ShmSize": 2**30,
        "Tmpfs": {"/tmp": "rw,nosuid,nodev,mode=1777"},
        "LogConfig": {"Type": "none", "Config": {}},
        "Init": True,
    },
}
"""What `runtimes/docker.py` asks for, as docker-py puts it; that it does is for `tests/contract/test_runtimes.py`."""
GPUS = [{"Driver": "", "Count": -1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}]


def job(**changes):
    """The request of a job, changed: `HostConfig__Memory=1` is a change within, `...` takes a key away."""
    made = copy.deepcopy(JOB)
    for path, value in changes.items():
        *outer, key = path.split("__")
        inner = made
        for part in outer:
            inner = inner[part]
        if value is ...:
            del inner[key]
        else:
            inner[key] = value
    return made


def test_a_job_is_let_through_in_words_of_our_own():
    """Its folder is asked for as a part of the volume, and its container bears the mark of the door."""
    made = container(NAME, JOB, RULES)
    mount = {"Type": "volume", "Source": "jobs"}
    assert made == {
        **{key: JOB[key] for key in ("User", "Env", "Entrypoint", "Cmd", "Image", "WorkingDir")},
        "Labels": {**JOB["Labels"], "evergreen.engine": "jobs"},
        "HostConfig": {
            **{key: value for key, value in JOB["HostConfig"].items() if key != "Binds"},
            "Mounts": [
                mount
                | {
                    "Target": f"{FOLDER}{part}",
                    "ReadOnly": bool(part),
                    "VolumeOptions": {"NoCopy": True, "Subpath": f"evergreen/{FOLDER.name}{part}"},
                }
                for part in ("", "/input")
            ],
        },
    }


def test_a_job_may_have_gpus():
    """By number or all of them, as NVIDIA's toolkit takes them."""
    assert container(NAME, job(HostConfig__DeviceRequests=GPUS), RULES)["HostConfig"]["DeviceRequests"] == GPUS


@pytest.mark.parametrize(
    ("method", "target", "ask"),
    [
        ("GET", "/_ping", ("ping", "")),
        ("HEAD", "/_ping", ("ping", "")),
        ("GET", "/version", ("version", "")),
        ("GET", "/v1.45/info", ("info", "")),
        (
            "GET",
            "/v1.45/images/registry.example.com:5000/a/churn:4/json",
            ("image", "registry.example.com:5000/a/churn:4"),
        ),
        ("GET", f"/v1.45/images/churn%40sha256:{'a' * 64}/json", ("image", f"churn@sha256:{'a' * 64}")),
        ("GET", "/v1.45/containers/evergreen-a-1/json", ("inspect", "evergreen-a-1")),
        ("POST", f"/v1.45/containers/{'a' * 64}/start", ("start", "a" * 64)),
        ("POST", f"/v1.45/containers/{'a' * 64}/wait", ("wait", "a" * 64)),
        ("POST", f"/v1.45/containers/{'a' * 64}/stop?t=5", ("stop", "a" * 64)),
        ("DELETE", f"/v1.45/containers/{'a' * 64}?v=False&link=False&force=True", ("remove", "a" * 64)),
    ],
)
def test_what_running_a_job_needs_is_understood(method, target, ask):
    """With and without the API's version in the path."""
    decided = decide(method, target, b"", RULES)
    assert (decided.what, decided.of) == ask


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["host", "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
keys = st.text(max_size=8) | st.sampled_from(
    [
        *JOB["HostConfig"],
        *(key.lower() for key in JOB["HostConfig"]),
        *(
            "Privileged",
            "privileged",
            "CapAdd",
            "Devices",
            "DeviceRequests",
            "Mounts",
            "VolumesFrom",
            "PidMode",
            "IpcMode",
        ),
        *(
            "UTSMode",
            "UsernsMode",
            "CgroupnsMode",
            "CgroupParent",
            "Runtime",
            "Sysctls",
            "Ulimits",
            "GroupAdd",
            "Links",
        ),
        *(
            "RestartPolicy",
            "AutoRemove",
            "DeviceCgroupRules",
            "MaskedPaths",
            "ReadonlyPaths",
            "OomScoreAdj",
            "VolumeDriver",
        ),
    ]
)
usual = st.fixed_dictionaries(
    {},
    optional={
        "Memory": st.integers(-1, 2**34),
        "NanoCpus": st.integers(-1, 2**33),
        "DeviceRequests": st.just(GPUS),
        "Privileged": st.sampled_from([False, None, True, 1]),
        "Binds": st.lists(st.sampled_from([*JOB["HostConfig"]["Binds"], "/:/host", f"{FOLDER}/../..:/x"]), max_size=3),
    },
)


@settings(max_examples=500)
@given(changes=st.dictionaries(keys, json_values, max_size=3) | usual)
def test_whatever_is_asked_what_passes_has_only_allowed_values(changes):
    """For any JSON in the place of any of its parts: it is refused, or it is a job within its limits and nothing else."""
    asked = {**JOB["HostConfig"], **changes}
    if "Memory" in changes:
        asked["MemorySwap"] = changes["Memory"]
    try:
        host = dict(container(NAME, {**JOB, "HostConfig": asked}, RULES)["HostConfig"])
    except Refused:
        return
    assert 0 < host["Memory"] == host.pop("MemorySwap") <= RULES.memory_bytes
    assert 0 < host.pop("NanoCpus") <= RULES.cpus * 1e9
    assert host.pop("DeviceRequests", GPUS) == GPUS
    assert {type(host.pop("Memory")), *(type(value) for value in host.values())} == {int, str, bool, list, dict}
    free = ("Memory", "MemorySwap", "NanoCpus", "DeviceRequests")
    assert host == {k: v for k, v in container(NAME, JOB, RULES)["HostConfig"].items() if k not in free}


@settings(max_examples=300)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD"]),
    target=st.text(max_size=60),
    body=st.binary(max_size=60),
)
def test_whatever_is_sent_is_decided(method, target, body):
    """No path, no query and no body makes the decision fail."""
    for path in (target, f"/containers/create?name={target}", f"/v1.45/containers/evergreen-{target}/stop?t=1"):
        with suppress(Refused):
            assert decide(method, path, body, RULES).what


def test_the_volume_that_jobs_lie_in_is_no_jobs_folder():
    """Nor is what lies above it, nor a way there in other letters."""
    for folder in (
        "/var/lib/jobs",
        "/var/lib",
        "/",
        "/var/lib/jobs/../x",
        "/var/lib/jobs//a",
        "/var/lib/jobs/.a",
        "a",
        "",
    ):
        with pytest.raises(Refused, match=r"WorkingDir is"):
            container(NAME, job(WorkingDir=folder), RULES)


def test_a_body_is_read_as_the_engine_would():
    """The engine takes a key in any letters, and the last of two: a body where that makes a difference is none."""
    body = json.dumps(JOB)
    assert decide("POST", f"/containers/create?name={NAME}", body.encode(), RULES).config
    for twice in ('{"image": "x", ' + body[1:], body.replace('"NetworkMode"', '"NetworkMode": "host", "NetworkMode"')):
        with pytest.raises(Refused, match="a key is there twice"):
            decide("POST", f"/containers/create?name={NAME}", twice.encode(), RULES)
