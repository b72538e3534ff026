"""Which method files are of: every file of this package without a leading underscore is asked in turn."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from trainjax.types import Params, Peft, PeftFiles

_FIRST = "beside"


def method_of(
    files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params] | None:
    """The method and the adapter in the files, or None if no method knows them.

    Args:
        files: settings and tensors.
        modules: PEFT's module for each of our matrices, by full name.
        params: the base, for the shapes.

    Raises:
        ValueError: of a method that knows them and refuses a setting or a tensor, by name.
    """
    package = importlib.import_module(__package__)
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    # What is beside a method is taken off its files first: alone they would be refused.
    for name in sorted(names, key=lambda name: name != _FIRST):
        if not name.startswith("_"):
            method = importlib.import_module(f"{package.__name__}.{name}")
            if (found := method.from_peft(files, modules, params)) is not None:
                return found
    return None
