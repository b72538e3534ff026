"""The real model's file, opened once: reading its header, vocabulary and all, takes seconds."""

from __future__ import annotations

from typing import Any

import pytest

from tests import helpers
from trainjax.io import gguf
from trainjax.io.gguf import GgufFile
from trainjax.io.gguf_header import Header, read_header


@pytest.fixture(scope="session")
def real_header() -> Header:
    return read_header(helpers.smollm2_gguf())


@pytest.fixture(scope="session")
def real_file(real_header: Header) -> GgufFile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "read_header", lambda path: real_header)
        return GgufFile(helpers.smollm2_gguf())


@pytest.fixture(scope="session")
def real(real_header: Header, real_file: GgufFile) -> Any:
    """Its tokenizer, which no test may change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "read_header", lambda path: real_header)
        return real_file.tokenizer()
