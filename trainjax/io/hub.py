"""From what a user calls a model to its files: a hub id, a folder, a .gguf file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trainjax.io.fetch import CATALOG, fetched
from trainjax.io.folder import HfFolder
from trainjax.io.own_head import with_its_head
from trainjax.io.quantised import readable
from trainjax.tree import nearest
from trainjax.types import Checkpoint

_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model")  # never *.bin, never *.py


def open_checkpoint(source: str | Path) -> Checkpoint:
    """The files of a model.

    Args:
        source: a folder, a `.gguf` file, a name of `fetch.CATALOG` that was fetched, or an id such as
            `HuggingFaceTB/SmolLM2-135M-Instruct`, which is downloaded once to the hub's own cache.

    Raises:
        ValueError: nothing of that name, or a hub that cannot be reached.
    """
    files = _open(source, _FILES)
    return readable(with_its_head(files)) if isinstance(files, HfFolder) else files


def _open(source: str | Path, patterns: tuple[str, ...]) -> Checkpoint:
    path = fetched(str(source)) or Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if files and not (path / "config.json").is_file():
            path = files[0]
        else:
            return HfFolder(path)
    if path.is_file() and path.suffix == ".gguf":
        from trainjax.io.gguf import GgufFile

        return GgufFile(path)
    if path.is_file():
        raise ValueError(
            f"{path} is a file, but not a .gguf; give a model's folder or a .gguf file"
        )
    if str(source) in CATALOG:
        raise ValueError(f"{source} is not on this machine yet: trainjax fetch {source}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ValueError(
            f"there is no model {str(source)!r}: give a folder, a .gguf file, a hub id (owner/name) or "
            f"one of {', '.join(CATALOG)}{nearest(str(source), CATALOG)}"
        )
    return HfFolder(_download(str(source), patterns))


def public_name(source: str | Path) -> str:
    """What others call a model: the hub's id of one in the catalogue, the whole path of a local one."""
    if str(source) in CATALOG:
        return CATALOG[str(source)].repo
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else str(source)


def read_config(source: str | Path) -> dict[str, Any]:
    """What `config.json` says, without the weights: a folder may have nothing else.

    Args:
        source: as in `open_checkpoint`; of a hub id this file alone is downloaded.

    Raises:
        ValueError: as `open_checkpoint`.
    """
    return _open(source, ("config.json",)).config


def _download(repo: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{repo!r} is not a folder here, and could not be had from the hub: {reason}"
        ) from error
