"""Files of methods that hold adapters of other methods: each as its own method writes it, under a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from trainjax.peft import _own_files as own_files
from trainjax.peft._methods import method_of
from trainjax.types import Params, Peft, PeftFiles

C = TypeVar("C")

_MEMBERS, _PREFIX = "members", "member:"


def export(method: str, config: Any, own: Params, members: Mapping[str, PeftFiles]) -> PeftFiles:
    """An adapter's files.

    Args:
        method: the name of the method's file in this package.
        config: its own settings, see `_own_files.export`.
        own: arrays that are no member's.
        members: the members' files by name.
    """
    files = own_files.export(method, config, own)
    tensors = {
        f"{_PREFIX}{name}:{key}": tensor
        for name, member in members.items()
        for key, tensor in member.tensors.items()
    }
    fields = {_MEMBERS: {name: member.fields for name, member in members.items()}}
    return PeftFiles(files.fields | fields, files.tensors | tensors)


def read(
    files: PeftFiles, method: str, kind: type[C], modules: Mapping[str, str], params: Params
) -> tuple[C, Params, dict[str, tuple[Peft, Params]]] | None:
    """The settings, the arrays that are no member's, and the members, or None for another method's files.

    Raises:
        ValueError: as `_own_files.read`; a member of no method here.
    """
    fields = dict(files.fields)
    members = fields.pop(_MEMBERS, {})
    mine = {key: x for key, x in files.tensors.items() if not key.startswith(_PREFIX)}
    if (found := own_files.read(PeftFiles(fields, mine), method, kind)) is None:
        return None
    read_members = {}
    for name, own in members.items():
        prefix = f"{_PREFIX}{name}:"
        theirs = {
            key.removeprefix(prefix): tensor
            for key, tensor in files.tensors.items()
            if key.startswith(prefix)
        }
        read_members[name] = _member(name, PeftFiles(own, theirs), modules, params)
    return *found, read_members


def _member(
    name: str, files: PeftFiles, modules: Mapping[str, str], params: Params
) -> tuple[Peft, Params]:
    if (found := method_of(files, modules, params)) is not None:
        return found
    raise ValueError(
        f"the adapter's member {name!r} of peft_type={files.fields.get('peft_type')!r} is not supported"
    )
