"""The models and adapters that transformers and PEFT wrote and computed (`golden/make_llama.py`)."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import helpers
from trainjax.models import Model, load


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all of them, unpacked."""
    folder = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(helpers.GOLDEN / "llama.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(golden: Path) -> Callable[[str], Model]:
    """Each of the models, loaded once."""
    return functools.cache(lambda name: load(golden / name))
