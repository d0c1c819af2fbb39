"""What the documents say is so: their commands are run, their paths, links, targets and names exist."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from evergreen.cli.commands import MODULES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "include" / "evergreen"
BIN = Path(sys.executable).parent


def project_files():
    """The files of the project: those git tracks, and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


FILES = project_files()
DOCUMENTS = [name for name in FILES if name.suffix == ".md"]
GUIDES = [Path(name) for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md")]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, kind):
    """The fenced blocks of a document that are tagged `kind`, or not tagged at all when it is empty."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)
    return [block for tag, block in found if tag == kind]


def spans(name):
    """What stands in backticks within the sentences of a document."""
    prose = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(name):
    """The lines that a reader is asked to type, in order."""
    return [line[2:] for block in blocks(name, "console") for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture
def copy(tmp_path):
    """The project as a fresh clone with its environment set up: its files, a link to .venv, and no home."""
    assert (ROOT / ".venv" / ".ready").is_file(), "make has not set .venv up; it must not do so from a copy"
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        os.utime(tmp_path / name, (0, 0))  # else make might install the copy into the environment of the project
    return tmp_path


def environment(project):
    """A reader's environment: nothing of this process's settings, and all places in the copy."""
    foreign = ("AIRFLOW", "_AIRFLOW", "EVERGREEN", "MLFLOW", "MAKE", "MFLAGS", "PYTEST")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    places = {"HOME": project / "var", "PROJECT": project, "PACKS": project / "include" / "packs"}
    return inherited | {f"EVERGREEN_{name}": str(place) for name, place in places.items()}


def test_the_guides_have_commands():
    """README and CONTRIBUTING show what to type, as blocks that the tests below read."""
    assert [len(commands(name)) > 2 for name in GUIDES[:2]] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", [GUIDES[0], pytest.param(GUIDES[1], marks=pytest.mark.fault)], ids=str)
def test_commands_work(copy, name):
    """Every command that a reader is asked to type succeeds, in order, in a fresh copy; and says what README shows."""
    said = {}
    for command in commands(name):
        done = subprocess.run(
            ["/bin/bash", "-c", command],
            cwd=copy,
            env=environment(copy),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
        said[command] = done.stdout
    for block in blocks(name, ""):
        if "✓" in block:
            shown, printed = masked(block), masked(said["make run"])
            assert printed[: len(shown)] == shown


def masked(text):
    """Lines without what differs between two machines: figures with a decimal point, hashes, devices."""
    text = re.sub(r"\b\d+\.\d+\b|\bon (cpu|cuda)\b|(?<=Z-)[0-9a-f]{8}", "#", text)
    return text.strip().splitlines()


def make_targets():
    """What `make help` lists."""
    done = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, env=environment(ROOT), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {line.split()[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("name", DOCUMENTS, ids=str)
def test_make_targets_exist(name):
    """`make help` lists every target that a document names, in blocks and in sentences."""
    lines = [
        line.removeprefix("$ ")
        for kind in ("", "console")
        for block in blocks(name, kind)
        for line in block.splitlines()
    ]
    named = [re.match(r"make ([a-z][a-z-]*)", line) for line in (*lines, *spans(name))]
    assert {found[1] for found in named if found} - make_targets() == set()


@pytest.mark.parametrize("name", DOCUMENTS, ids=str)
def test_evergreen_commands_exist(name):
    """Every `evergreen …` that a document names is a command."""
    lines = [line.removeprefix("$ ") for block in blocks(name, "console") for line in block.splitlines()]
    named = [re.match(r"(?:\.venv/bin/)?evergreen ([a-z-]+)", line) for line in (*lines, *spans(name))]
    assert {found[1] for found in named if found} - MODULES.keys() == set()


def tree():
    """The paths in README's tree, each with what is said of it."""
    section = text_of("README.md").split("\n## The tree\n")[1]
    block = re.search(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[1]
    found, above = {}, ""
    for line in block.splitlines():
        path, said = line.split(maxsplit=1)
        above = above if line.startswith(" ") else path
        found[path if path == above else above + path] = said
    return found


def test_the_tree_is_there():
    """Every path in README's tree is a folder of the project, with files in it."""
    folders = {f"{parent}/" for name in FILES for parent in name.parents}
    assert tree().keys() - folders == set()


def test_the_tree_is_whole():
    """Every folder of the project is in README's tree, and every room of the package."""
    tops = {name.parts[0] for name in FILES if len(name.parts) > 1 and not name.parts[0].startswith(".")}
    assert tops == {path.split("/")[0] for path in tree()}
    rooms = {f"include/evergreen/{init.parent.name}/" for init in PACKAGE.glob("*/__init__.py")}
    assert rooms - tree().keys() == set()


@pytest.mark.parametrize("folder", ["tests", "include/packs"])
def test_the_tree_names_what_is_within(folder):
    """The kinds of tests and the packs, by name."""
    depth = folder.count("/") + 1
    within = {name.parts[depth] for name in FILES if name.is_relative_to(folder) and len(name.parts) > depth + 1}
    assert set(re.findall(r"\w+", tree()[f"{folder}/"].split(":")[0])) == within


@pytest.mark.parametrize("name", DOCUMENTS, ids=str)
def test_links_resolve(name):
    """Links within the project lead to a file of it."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(name))
    inside = [((ROOT / name).parent / link).resolve() for link in links if not urlsplit(link).scheme]
    assert [str(path) for path in inside if not path.is_relative_to(ROOT) or not path.exists()] == []


@pytest.mark.parametrize("name", GUIDES, ids=str)
def test_files_that_are_named_exist(name):
    """A path in backticks is one of the project, of the package, or of a pack."""
    places = (ROOT, PACKAGE, ROOT / "include" / "packs" / "digits")
    named = [
        span
        for span in spans(name)
        if re.fullmatch(r"(?:tests|docs|benchmarks)/[\w/]*|[\w/.-]+\.(?:py|md|in|txt)", span)
    ]
    assert [path for path in named if not any((place / path).exists() for place in places)] == []


@pytest.mark.parametrize("name", GUIDES, ids=str)
def test_functions_that_are_named_exist(name):
    """`module.name` in backticks, where the package has such a module, is in it."""
    named = [found for span in spans(name) if (found := re.fullmatch(r"([a-z_]+)\.(\w+)", span))]
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    wrong = [
        found[0]
        for found in named
        if found[1] in modules
        and found[2] != "py"
        and not hasattr(importlib.import_module(f"evergreen.{found[1]}"), found[2])
    ]
    assert wrong == []


def test_no_file_names_this_checkout():
    """No file of the project names the folder it happens to lie in: it works in any."""
    if len(ROOT.parts) <= 2:
        pytest.skip("a folder like /app may be named anywhere")
    assert [name for name in FILES if str(ROOT).encode() in (ROOT / name).read_bytes()] == []
