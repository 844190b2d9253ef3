"""The container files, without an engine: linted, and what they name is there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name: str) -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed (extra lint)")
    outcome = subprocess.run([hadolint, name], cwd=ROOT, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stdout) == (0, "")


@pytest.mark.parametrize("name", FILES)
def test_a_container_runs_as_no_root_and_says_how_it_is(name: str) -> None:
    text = (ROOT / name).read_text()
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1].startswith("1000")
    assert re.search(r"^HEALTHCHECK .*CMD ", text, re.MULTILINE)


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    sources = [
        source
        for line in re.findall(r"^COPY (.*)$", (ROOT / name).read_text(), re.MULTILINE)
        for source in line.split()[1:-1]
    ]
    assert len(sources) > 4
    for source in sources:
        assert (ROOT / source).exists()
        assert source not in ignored


@pytest.mark.parametrize("name", FILES)
def test_the_base_is_pinned_to_the_versions_that_are_tested(name: str) -> None:
    """Of the GPU image the base brings PyTorch: another than that of constraints.txt would be installed over it."""
    text = (ROOT / name).read_text()
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    if "FROM pytorch/pytorch:${PYTORCH}" in text:
        assert f"ARG PYTORCH={pinned[1]}-cuda" in text
    else:
        assert re.search(r"^FROM python:3\.\d+-slim$", text, re.MULTILINE)


def test_the_nodes_of_the_composition_meet_each_other() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    assert len(services) == 2
    for name, service in services.items():
        environment = service["environment"]
        assert environment["NNODES"] == str(len(services))
        assert environment["HEAD"] in services
        assert service["hostname"] == name
        _, script, job, *_ = service["command"]
        assert (ROOT / script).exists()
        assert (ROOT / job).exists()
        # What the script takes, and no other: a wrong name would be ignored.
        usage = subprocess.run(["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert all(re.search(rf"^  {variable}\b", usage, re.MULTILINE) for variable in environment)
    anchors = {(service["image"], service["build"]["dockerfile"]) for service in services.values()}
    assert anchors == {("dengine:cpu", "docker/Dockerfile.cpu")}
