"""What the images and the services are made of, as the files say it: no engine is needed, so no change escapes it."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
COMPOSE = PROJECT / "docker-compose.yaml"
OVERLAYS = sorted(PROJECT.glob("docker-compose.*.yaml"))
PINS = dict(
    line.split("=", 1)
    for line in (PROJECT / ".env").read_text(encoding="utf-8").splitlines()
    if re.match(r"\w+=", line)
)
INSTRUCTION = re.compile(r"(?m)^([A-Z]+) (.*(?:\\\n.*)*)")


class Loader(yaml.SafeLoader):
    """Compose's own tags, as `!reset`, say how files are merged; what they stand before is read as it is."""


Loader.add_multi_constructor("!", lambda loader, _, node: getattr(loader, f"construct_{node.id}")(node))


def read(file):
    return yaml.load(file.read_text(encoding="utf-8"), Loader)


def services():
    """Every service with the file that introduces it; overlays change others, too, which then have no image."""
    for file in (COMPOSE, *OVERLAYS):
        for name, service in read(file)["services"].items():
            if isinstance(service, dict) and ("image" in service or "build" in service):
                yield pytest.param(service, id=f"{file.name}:{name}")


def stages():
    """The stages of the Dockerfile: where each begins, and its instructions."""
    text = (PROJECT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^ *#.*\n", "", text)
    found = {}
    for word, rest in INSTRUCTION.findall(text):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = []
            found[name].append(("FROM", base))
        elif found:
            found[name].append((word, rest))
    return found


@pytest.mark.parametrize("service", services())
def test_each_service_is_confined(service):
    """No capability, no way to gain one, a root it cannot write to, limits; published, if at all, on loopback."""
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert not service.get("privileged")
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert all(service[limit] for limit in ("mem_limit", "pids_limit", "cpus"))
    assert service.get("networks") or service["network_mode"] == "none"
    for port in service.get("ports", ()):
        assert re.match(r"127\.0\.0\.1:|\$\{EVERGREEN_LISTEN:-127\.0\.0\.1\}:", port), port


@pytest.mark.parametrize("service", services())
def test_no_service_is_told_a_secret_in_its_environment(service):
    """A value that names a password, a token or a key is a file's path, or a command that reads one."""
    for name, value in service.get("environment", {}).items():
        if re.search(r"PASSWORD|TOKEN|SECRET|_KEY(_|$)|CREDENTIAL", name):
            assert "/run/secrets/" in str(value), name
        assert not re.search(r"://[^/@\s]+:[^/@\s]+@", str(value)), name


def test_secrets_are_files_of_one_folder():
    """All of them, so that `make stack` makes all and a backup has all."""
    for file in (COMPOSE, *OVERLAYS):
        for name, secret in read(file).get("secrets", {}).items():
            assert secret["file"].startswith("${EVERGREEN_SECRETS:-./secrets}/"), name


@pytest.mark.parametrize("service", services())
def test_images_are_named_by_an_exact_tag(service):
    """Each by a line of `.env`, which the file repeats for whoever has none; never `latest`, never without a tag."""
    name, default = re.fullmatch(r"\$\{(\w+):-(\S+)\}", service["image"]).groups()
    assert PINS[name] == default
    assert re.search(r":[^:/]*\d[^:/]*$", default), default


def test_no_container_holds_the_engines_socket_by_default():
    """Whoever holds it owns the machine."""
    assert "docker.sock" not in COMPOSE.read_text(encoding="utf-8")


def test_a_training_that_waits_for_a_gpu_is_not_failed(monkeypatch):
    """Airflow's scheduler takes ten minutes in a queue for a lost task; here it queues it anew for longer than any trains."""
    from airflow.jobs.job import Job
    from airflow.jobs.scheduler_job_runner import SchedulerJobRunner

    values = read(PROJECT / "config" / "kubernetes" / "values.yaml")
    for environment in (
        read(COMPOSE)["services"]["airflow-scheduler"]["environment"],
        {each["name"]: each["value"] for each in values["env"]},
    ):
        for name in [name for name in environment if name.startswith("AIRFLOW__SCHEDULER__")]:
            monkeypatch.setenv(name, environment[name])
        scheduler = SchedulerJobRunner(Job())
        assert scheduler._num_stuck_queued_retries * scheduler._task_queued_timeout > 30 * 86400
        for name in [name for name in environment if name.startswith("AIRFLOW__SCHEDULER__")]:
            monkeypatch.delenv(name)


def test_the_dockerfile_keeps_to_the_rules():
    """What linters of Dockerfiles ask: pinned bases, lists of packages removed, no ADD, no secret, nobody is root."""
    made = stages()
    bases = {"scratch", "${PYTHON_IMAGE}", *made}
    for name, instructions in made.items():
        assert {rest for word, rest in instructions if word == "FROM"} <= bases, name
        for word, rest in instructions:
            assert word != "ADD", "COPY says what it does"
            if word in ("ARG", "ENV"):
                assert not re.search(r"PASSWORD|TOKEN|SECRET", rest), rest
            if "apt-get install" in rest:
                assert "--no-install-recommends" in rest, rest
                assert "rm -rf /var/lib/apt/lists/*" in rest, rest
            assert not re.search(r"curl .*\| *(ba)?sh|sudo ", rest), rest
    for name in ("evergreen", "store"):
        users = [rest for word, rest in made[name] if word == "USER"]
        assert users[-1:] == ["evergreen"], name
        words = [word for word, _ in made[name]]
        assert "RUN" not in words[words.index("USER") :], "nothing is installed after the user is nobody"


def test_every_locked_package_has_a_hash():
    """All but torch, of which each build has another; what it is replaced by is the builder's to say."""
    lock = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    packages = re.findall(r"(?m)^([a-zA-Z0-9_.\[\],-]+)==((?:.*\\\n)*.*)", lock)
    assert len(packages) > 200
    assert {name for name, rest in packages if "--hash=sha256:" not in rest} <= {"torch"}


@pytest.mark.usefixtures("compose")
@pytest.mark.parametrize("overlays", [[], *([file] for file in OVERLAYS), OVERLAYS], ids=str)
def test_compose_accepts_the_files(overlays, tmp_path):
    """The stack alone, with each overlay, and with all of them."""
    (tmp_path / "image.env").touch()
    done = subprocess.run(
        [
            "docker",
            "compose",
            *(word for file in (COMPOSE, *overlays) for word in ("-f", file)),
            "config",
            "--format=json",
        ],
        cwd=PROJECT,
        env={**os.environ, "EVERGREEN_SECRETS": str(tmp_path), "DOCKER_GROUP": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {"init", "worker", "worker-gpu"} <= json.loads(done.stdout)["services"].keys()


@pytest.mark.usefixtures("compose")
def test_only_tls_is_published_off_loopback(tmp_path):
    """EVERGREEN_LISTEN publishes the service `tls` alone: not one plain port, nor what asks nobody who they are."""
    (tmp_path / "image.env").touch()
    told = subprocess.run(
        ["docker", "compose", "-f", COMPOSE, "-f", PROJECT / "docker-compose.tls.yaml", "config", "--format=json"],
        cwd=PROJECT,
        env={**os.environ, "EVERGREEN_SECRETS": str(tmp_path), "EVERGREEN_LISTEN": "0.0.0.0"},
        check=True,
        capture_output=True,
    )
    services = json.loads(told.stdout)["services"]
    published = {name: {port["host_ip"] for port in each.get("ports", ())} for name, each in services.items()}
    published = {name: where for name, where in published.items() if where}
    loopback = {"127.0.0.1"}
    assert published == {"tls": {"0.0.0.0"}, "prometheus": loopback, "alertmanager": loopback}
