"""`trainjax JOB ...`: one job for each file in `recipes/`, its flags from the file's `Config`."""

from __future__ import annotations

import ast
import collections
import dataclasses
import importlib
import logging
import os
import pkgutil
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainjax import recipes
from trainjax.recipes import Prose

C = typing.TypeVar("C")

DEBUG = "TRAINJAX_DEBUG"  # set to 1 for the traceback of an error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a job; returns the exit status.

    0: done. 1: the job could not be done, and one sentence says why. 2: the command is not right.
    128 + n: stopped by signal n, after saving. 75: another process of the run has gone; to be tried again.
    """
    try:
        try:
            return _alone(_main((sys.argv[1:] if argv is None else list(argv)) or ["--help"]))
        finally:
            sys.stdout.flush()  # now, so that a reader that has gone is noticed here
    except KeyboardInterrupt:
        return _alone(_fail("interrupted", 130))
    except BrokenPipeError:  # the reader of our output has gone: nothing to tell anybody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        if _is_one_of_several():
            traceback.print_exc()
            _alone(1)
        raise


def _main(argv: list[str]) -> int:
    jobs = _jobs()
    try:
        place, (name, *args) = _place(argv)
    except ValueError as error:
        return _fail(str(error), 2)
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
    module = importlib.import_module(f"{recipes.__name__}.{name.replace('-', '_')}")
    try:
        config = parse(module.Config, args, prog=f"trainjax {name}")
    except ValueError as error:
        return _fail(str(error), 2)
    return _run(module.main, config, place)


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _alone(status: int) -> int:
    """The exit status; of several processes, one that failed ends here and does not wait for the others.

    They are in a step that it takes no part in any more, and see that it has gone.
    """
    if status and _is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


_PLACE = {"--coordinator": str, "--num-processes": int, "--process-id": int}


def _place(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What comes before the job: which of several processes this is."""
    found: dict[str, Any] = {}
    rest = list(argv)
    while rest and rest[0].partition("=")[0] in _PLACE:
        name, equals, value = rest.pop(0).partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"{name} needs a value: {_kind(_PLACE[name])}")
            value = rest.pop(0)
        if not _fits(value, _PLACE[name]):
            raise ValueError(f"{name} is {_wrong(value, _PLACE[name])}")
        found[name.removeprefix("--").replace("-", "_")] = _PLACE[name](value)
    return found, rest or ["--help"]


def _run(job: Callable[[Any], None], config: Any, place: Mapping[str, Any]) -> int:
    from jax.errors import JaxRuntimeError

    from trainjax.parallel import initialize, is_peer_lost
    from trainjax.train import NotFinite, Stopped

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    logging.getLogger("absl").setLevel(
        logging.CRITICAL
    )  # Orbax logs tracebacks of errors it raises
    try:
        if hasattr(config, "mesh"):
            initialize(**place)
        job(config)
    except Stopped as stop:
        print(f"{stop}; continue it with --resume", file=sys.stderr)
        return 128 + stop.signal
    except BrokenPipeError:
        raise
    except (ValueError, OSError, KeyError, NotFinite, JaxRuntimeError) as error:
        if os.environ.get(DEBUG):
            raise
        if is_peer_lost(error):
            why = str(error).splitlines()[0]
            return _fail(
                f"another process of this run has gone ({why}); continue with --resume", 75
            )
        if isinstance(error, JaxRuntimeError):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        return _fail(f"{message}", 1)
    return 0


def parse(config: type, args: Sequence[str], *, prog: str) -> Any:
    """The settings from flags, and from the YAML files of `--config` below them.

    Raises:
        ValueError: an option or a key that does not exist, with the nearest that does; a value of
            another kind than the option takes; a file that cannot be read; a setting that is missing.
    """
    import tyro

    if any(arg.startswith("--tyro-") for arg in args):  # a script that completes words in a shell
        return tyro.cli(config, args=list(args), prog=prog)
    options = dict(_options(config))
    files, flags = _split(args)
    given = [flag for file in files for flag in _from_yaml(file, options)] + flags
    words = _check(flags, options)
    if not {"-h", "--help"} & set(flags):
        _check_complete(config, given, words, prog)
    return _at_home(tyro.cli(config, args=given, prog=prog))


def _at_home(config: C) -> C:
    """The settings with `~` as the home folder in every path and in every name of rows or of a model."""
    hints = typing.get_type_hints(type(config))
    fields = dataclasses.fields(typing.cast(Any, config))
    values = {f.name: _expanded(getattr(config, f.name), hints[f.name]) for f in fields}
    return dataclasses.replace(typing.cast(Any, config), **values)


def _expanded(value: Any, type_: Any) -> Any:
    """A setting's value, of that type, with `~` expanded where it is no prose."""
    if dataclasses.is_dataclass(value):
        return _at_home(value)
    if isinstance(value, tuple):
        return tuple(_expanded(item, _item(type_)) for item in value)
    if _without_none(type_)[0] is Prose or not isinstance(value, str | Path):
        return value
    return type(value)(_home(str(value)))


def _home(text: str) -> str:
    """A path with `~` or `~user` as the folder that it stands for, also after `NAME=` and `hf:`.

    As in a shell, the name of a user whom there is not stays as it is.
    """
    before, tilde, after = _TILDE.fullmatch(text).groups()  # type: ignore[union-attr]
    return before + os.path.expanduser(tilde) + after


_TILDE = re.compile(r"((?:[^/~]*[=:])?)(~[^/]*|)(.*)", re.DOTALL)


def _options(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The options of a settings class, nested ones with dots, and the type of each."""
    hints = typing.get_type_hints(config)
    words = _words(config)
    for field in dataclasses.fields(config):
        if field in words:
            continue
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _options(hints[field.name], f"{name}.")
        else:
            yield name, hints[field.name]


def _split(args: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files of `--config FILE` and `--config=FILE`, and the arguments that are left."""
    files, rest, left = [], [], iter(args)
    for arg in left:
        name, equals, value = arg.partition("=")
        if name != "--config":
            rest.append(arg)
            continue
        value = value if equals else next(left, "")
        if not value:
            raise ValueError("--config needs the name of a YAML file")
        files.append(Path(_home(value)))
    return files, rest


def _words(config: type) -> list[Any]:
    """The fields that are given as words, not as options."""
    hints = typing.get_type_hints(config, include_extras=True)
    return [f for f in dataclasses.fields(config) if hasattr(hints[f.name], "__metadata__")]


def _check(flags: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The arguments that are no options; raises for an option or a value that there is not."""
    words, rest = [], collections.deque(flags)
    while rest:
        flag = rest.popleft()
        if not flag.startswith("--"):
            words.append(flag)
            continue
        name, equals, value = flag.removeprefix("--").partition("=")
        name = _canonical(name.replace("_", "-"), options)
        if name == "help":
            continue
        if name not in options:
            raise ValueError(f"there is no option --{name}{_nearest(name, options, prefix='--')}")
        if options[name] is bool:
            if equals:
                raise ValueError(f"--{name} takes no value: give --{name} or {_negated(name)}")
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value: {_kind(options[name])}")
            value = rest.popleft()
        if not _fits(value, options[name]):
            raise ValueError(f"--{name} is {_wrong(value, options[name])}")
        while _is_list(options[name]) and rest and not rest[0].startswith("--"):
            if not _fits(value := rest.popleft(), options[name]):
                raise ValueError(f"--{name} is {_wrong(value, options[name])}")
    return words


def _canonical(name: str, options: Mapping[str, Any]) -> str:
    """The switch that a negated one turns off; any other name as it is."""
    switches = {_negated(option): option for option, type_ in options.items() if type_ is bool}
    return switches.get(f"--{name}", name)


def _check_complete(config: type, given: Sequence[str], words: Sequence[str], prog: str) -> None:
    """Raises for settings without a default that are missing, and for words that say nothing."""
    slots = _words(config)
    if len(words) > len(slots):
        raise ValueError(f"{words[len(slots)]!r} is not an option; options begin with --")
    names = {flag.partition("=")[0].replace("_", "-") for flag in given}
    missing = [field.name.upper() for field in slots[len(words) :] if _is_required(field)]
    flags = [f"--{f.name.replace('_', '-')}" for f in _others(config, slots) if _is_required(f)]
    missing += [flag for flag in flags if flag not in names]
    if missing:
        raise ValueError(f"{prog} needs {', '.join(missing)}; {prog} --help tells what each is")


def _others(config: type, words: Sequence[Any]) -> list[Any]:
    return [field for field in dataclasses.fields(config) if field not in words]


def _is_required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


_KINDS = {int: "a whole number", float: "a number", str: "a text", Prose: "a text", Path: "a path"}


def _kind(type_: Any) -> str:
    """What an option takes, in words."""
    kind, _ = _without_none(type_)
    if _is_list(kind):
        return f"{_kind(_item(kind))}, or several"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    return _KINDS[kind]


def _wrong(value: Any, type_: Any) -> str:
    """What an option takes, and not the value that was given."""
    kind, _ = _without_none(type_)
    kind = _item(kind) if _is_list(kind) else kind
    known = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    return f"{_kind(type_)}, not {value!r}{_nearest(str(value), known)}"


def _fits(value: str, type_: Any) -> bool:
    """Whether an option of this type takes the value."""
    kind, optional = _without_none(type_)
    if optional and value == "None":
        return True
    if _is_list(kind):
        return _fits(value, _item(kind))
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    try:
        return kind(value) is not None
    except ValueError:
        return False


def _is_list(type_: Any) -> bool:
    """Whether an option takes several values."""
    return typing.get_origin(type_) is tuple


def _item(type_: Any) -> Any:
    """What each of several values is: `int` of `tuple[int, ...]`."""
    return typing.get_args(type_)[0]


def _without_none(type_: Any) -> tuple[Any, bool]:
    """The type that an option takes, and whether it may be None."""
    parts = typing.get_args(type_)
    if type(None) not in parts:
        return type_, False
    (kind,) = (part for part in parts if part is not type(None))
    return kind, True


def _from_yaml(path: Path, options: Mapping[str, Any]) -> list[str]:
    """A YAML file's settings as the flags that they stand for."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings (key: value)")
    flags: list[str] = []
    for key, value in _flattened(content):
        name = key.replace("_", "-")
        if name not in options:
            raise ValueError(f"{path}: there is no setting {key!r}{_nearest(name, options)}")
        if value is None:
            continue
        if options[name] is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{path}: {key} is true or false, not {value!r}")
            flags.append(f"--{name}" if value else _negated(name))
        elif _is_list(options[name]) and isinstance(value, list):
            flags += [f"--{name}", *map(str, value)] if value else []  # checked with the flags
        elif isinstance(value, list) or not _fits(str(value), options[name]):
            raise ValueError(f"{path}: {key} is {_wrong(value, options[name])}")
        else:
            flags.append(f"--{name}={value}")
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
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            jobs[module.name.replace("_", "-")] = text.partition("\n")[0]
    return jobs


def _overview(jobs: Mapping[str, str]) -> str:
    width = max(map(len, jobs))
    lines = [f"  {name:<{width}}  {text}" for name, text in jobs.items()]
    usage = "usage: trainjax JOB [OPTIONS]\n\nPost-training of language models in JAX.\n\njobs:\n"
    more = (
        "\n\ntrainjax JOB --help tells the options of a job.\n\n"
        "Processes that a scheduler started (SLURM, Kubernetes, Open MPI, a TPU pod) find one another;\n"
        "others are told where they are:\n"
        "trainjax --coordinator HOST:PORT --num-processes N --process-id I JOB [OPTIONS]"
    )
    return usage + "\n".join(lines) + more


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any], prefix: str = "") -> str:
    from trainjax.tree import nearest

    return nearest(prefix + word, [prefix + name for name in known])


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
