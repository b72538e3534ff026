"""`trainjax JOB ...`: one job for each file in `recipes/`, its flags from the file's `Config`."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import logging
import os
import pkgutil
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainjax import recipes

DEBUG = "TRAINJAX_DEBUG"  # set to 1 for the traceback of an error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a job; returns the exit status.

    0: done. 1: the job could not be done, and one sentence says why. 2: the command is not right.
    128 + n: stopped by signal n, after saving.
    """
    name, *args = (sys.argv[1:] if argv is None else argv) or ["--help"]
    jobs = _jobs()
    if name in ("-h", "--help"):
        print(_overview(jobs))
        return 0
    if name == "--version":
        print(f"trainjax {importlib.import_module('importlib.metadata').version('trainjax')}")
        return 0
    if name not in jobs:
        return _fail(
            f"the jobs are {', '.join(jobs)}; there is no {name!r}{_nearest(name, jobs)}", 2
        )
    module = importlib.import_module(f"{recipes.__name__}.{name}")
    try:
        config = parse(module.Config, args, prog=f"trainjax {name}")
    except ValueError as error:
        return _fail(str(error), 2)
    return _run(module.main, config)


def _run(job: Callable[[Any], None], config: Any) -> int:
    from trainjax.train import NotFinite, Stopped

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(
        logging.CRITICAL
    )  # Orbax logs tracebacks of errors it raises
    try:
        job(config)
    except Stopped as stop:
        print(f"{stop}; continue it with --resume", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone: nothing to tell anybody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, KeyError, NotFinite) as error:
        if os.environ.get(DEBUG):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        return _fail(f"{message}", 1)
    return 0


def parse(config: type, args: Sequence[str], *, prog: str) -> Any:
    """The settings from flags, and from the YAML files of `--config` below them.

    Raises:
        ValueError: an option or a key that does not exist, with the nearest that does; a file that
            cannot be read.
    """
    import tyro

    options = dict(_options(config))
    given: list[str] = []
    rest = list(args)
    while "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise ValueError("--config needs the name of a YAML file")
        given += _from_yaml(Path(rest[at + 1]), options)
        del rest[at : at + 2]
    for arg in rest:
        name = arg.partition("=")[0].replace("_", "-").removeprefix("--")
        is_option = arg.startswith("--") and len(arg) > 2
        if is_option and name.removeprefix("no-") not in options and name != "help":
            raise ValueError(f"there is no option --{name}{_nearest(name, options, prefix='--')}")
    return tyro.cli(config, args=[*given, *rest], prog=prog)


def _options(config: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """The options of a settings class, nested ones with dots; and whether each is a switch."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _options(hints[field.name], f"{name}.")
        else:
            yield name, hints[field.name] is bool


def _from_yaml(path: Path, options: Mapping[str, bool]) -> list[str]:
    """A YAML file's settings as the flags that they stand for."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings (key: value)")
    flags: list[str] = []
    for key, value in _flattened(content):
        name = key.replace("_", "-")
        if name not in options:
            raise ValueError(f"{path}: there is no setting {key!r}{_nearest(name, options)}")
        if isinstance(value, bool) and options[name]:
            flags.append(f"--{name}" if value else _negated(name))
        elif value is not None:
            flags += [f"--{name}", str(value)]
    return flags


def _negated(name: str) -> str:
    group, dot, last = name.rpartition(".")
    return f"--{group}{dot}no-{last}"


def _flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _jobs() -> dict[str, str]:
    """Each job with the first line of its file, which is not imported for it."""
    jobs = {}
    for module in pkgutil.iter_modules(recipes.__path__):
        if not module.name.startswith("_"):
            file = Path(recipes.__path__[0]) / f"{module.name}.py"
            text = ast.get_docstring(ast.parse(file.read_text())) or ""
            jobs[module.name] = text.partition("\n")[0]
    return jobs


def _overview(jobs: Mapping[str, str]) -> str:
    width = max(map(len, jobs))
    lines = [f"  {name:<{width}}  {text}" for name, text in jobs.items()]
    usage = "usage: trainjax JOB [OPTIONS]\n\nPost-training of language models in JAX.\n\njobs:\n"
    return usage + "\n".join(lines) + "\n\ntrainjax JOB --help tells the options of a job."


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any], prefix: str = "") -> str:
    from trainjax.tree import nearest

    return nearest(prefix + word, [prefix + name for name in known])


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
