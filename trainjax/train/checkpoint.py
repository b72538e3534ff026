"""Checkpoints of a run: written beside the training by Orbax, whole or not at all, and checked.

Every checkpoint carries a checksum of each of its files, written before the checkpoint gets its final
name. What a disk or a copy has damaged since is noticed when it is read, named, and passed over for
the one before it.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from trainjax import retries, tree
from trainjax.train.state import TrainState

_MANIFEST = "manifest.json"
_NOT_SUMMED = {_MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}  # Orbax writes these last
_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What a checkpoint gave back.

    Attributes:
        state: laid out over devices as the state that it was restored into.
        extra: the JSON that was saved with it: position in the data, settings.
        step: the steps that it had done.
    """

    state: TrainState
    extra: dict[str, Any]
    step: int


def may_be_repeated(error: OSError) -> bool:
    """Whether a checkpoint that was not written can be written again.

    Where the filesystem was away for a moment; of several processes one alone may know that it was.
    """
    return jax.process_count() == 1 and retries.is_transient(error)


class _Manager(ocp.CheckpointManager):
    """Orbax's, which does not ask JAX whether the run is to stop.

    The processes agree on one call after which they stop. Orbax asks twice in every `save`; where that
    call was one of its own, the training loop never came to know of the signal.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        directory: where they are; made if it is not there.
        keep: how many of the newest are kept.
    """

    def __init__(self, directory: Path | str, keep: int = 3) -> None:
        self.directory = Path(directory).absolute()
        self._saving = -1
        self._arrays: dict[str, list[int]] = {}
        self._manager = _Manager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "extra": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,  # what a killed process left half written
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    def save(self, state: TrainState, extra: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint of the state; returns once the arrays have been copied.

        Where the one before it failed because the filesystem was away for a moment, this one takes its place;
        not of several processes, which would have to agree on it.

        Raises:
            OSError: the one before it could not be written (a full disk, a folder gone).
        """
        try:
            self.wait()
        except OSError as error:
            if not may_be_repeated(error):
                raise
            _log.warning("%s; the next one takes its place", error)
        step = int(state.step)
        self._saving, self._arrays = step, _shapes(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_as_arrays(jax.tree.map(_lasting, state))),
            extra=ocp.args.JsonSave(dict(extra)),
        )
        self._manager.save(step, args=items)

    def restore(
        self, state: TrainState, accept: Callable[[dict[str, Any]], None] = lambda extra: None
    ) -> Restored | None:
        """The newest sound checkpoint, laid out like `state`; None if there is none at all.

        Args:
            state: a fresh state: says which arrays are expected, and where they go.
            accept: sees what was saved beside the state, before anything else is read, and raises where
                the checkpoint is of another run.

        Raises:
            ValueError: there are checkpoints, but none is sound, or the newest sound one holds other
                arrays than `state`; the message names them.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: list[int] = []
        for step in steps:
            if damage := self._damage(step):
                _log.warning(
                    "%s is damaged (%s); the one before it is used", self._path(step), damage
                )
                damaged.append(step)
                continue
            accept(self._extra(step))
            self._check_structure(step, state)
            self._put_aside(damaged)
            return self._read(step, state)
        if steps:
            raise ValueError(f"all {len(steps)} checkpoints in {self.directory} are damaged")
        return None

    def newest(self) -> str:
        """The path of the newest checkpoint that has been written, or `none`."""
        self.wait()
        step = self._manager.latest_step()
        return "none" if step is None else str(self._path(step))

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            OSError: the last checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            reason = ": ".join(str(error).splitlines()[0].split(": ")[-2:])  # the innermost of many
            raise OSError(
                f"the checkpoint of step {self._saving} could not be written to {self.directory}: {reason}"
            ) from error

    def close(self) -> None:
        """Waits for what is being written, then lets go of the folder."""
        self.wait()
        self._manager.close()

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _extra(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(extra=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args).extra

    def _read(self, step: int, state: TrainState) -> Restored:
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(_abstract, _as_arrays(state))),
            extra=ocp.args.JsonRestore(),
        )
        restore = functools.partial(self._manager.restore, step, args=items)
        # Of several processes all take part, so that one alone cannot do it again.
        found = restore() if jax.process_count() > 1 else retries.retried(restore)
        return Restored(_with_key_of(state, found.state), found.extra, step)

    def _write_manifest(self) -> None:
        """Called by Orbax when all files are there, before the folder gets its final name."""
        if jax.process_index() > 0:
            return
        for folder in self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            _dump_manifest(folder, {"arrays": self._arrays, "files": _checksums(folder)})

    def _put_aside(self, damaged: Sequence[int]) -> None:
        """Gives damaged checkpoints another name: the run will write those steps anew."""
        for step in damaged if jax.process_index() == 0 else ():
            names = (self.directory / f"{step}.damaged{'+' * n}" for n in itertools.count())
            self._path(step).rename(next(name for name in names if not name.exists()))
        if damaged:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"{self.directory} without {damaged}")
            self._manager.reload()

    def _damage(self, step: int) -> str:
        """What is wrong with a checkpoint's files, or nothing."""
        folder = self._path(step)
        try:
            expected = retries.retried(_load_manifest, folder)["files"]
        except (OSError, ValueError) as error:
            return f"its list of checksums cannot be read: {error}"
        found = retries.retried(_checksums, folder)
        for name, checksum in expected.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != checksum:
                return f"{name} is not what was written"
        return ""

    def _check_structure(self, step: int, state: TrainState) -> None:
        there = _load_manifest(self._path(step))["arrays"]
        here = _shapes(state)
        odd = sorted(
            name for name in here.keys() | there.keys() if here.get(name) != there.get(name)
        )
        if odd:
            told = [
                f"{name} is {there.get(name, 'not in it')}, this run has "
                f"{here.get(name, 'no such array')}"
                for name in odd[:5]
            ]
            raise ValueError(
                f"{self._path(step)} was written by another configuration: {'; '.join(told)} "
                f"({len(odd)} arrays differ)"
            )


def _shapes(state: TrainState) -> dict[str, list[int]]:
    return {name: list(leaf.shape) for name, leaf in tree.flatten(_as_arrays(state)).items()}


def _dump_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """The list of what a checkpoint holds, with a checksum of the list itself."""
    text = json.dumps({"checksum": _checksum(content), **content})
    (folder / _MANIFEST).write_text(text, encoding="utf-8")


def _load_manifest(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise ValueError("it is not what was written")
    return content


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below a folder."""
    sums = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not (file.parent == folder and file.name in _NOT_SUMMED):
            checksum, size = 0, 0
            with file.open("rb") as opened:
                while block := opened.read(2**22):
                    checksum, size = zlib.crc32(block, checksum), size + len(block)
            sums[str(file.relative_to(folder))] = [size, checksum]
    return sums


def _as_arrays(state: TrainState) -> TrainState:
    """The state with its random key as plain numbers, which any version of JAX reads back."""
    return state._replace(key=jax.random.key_data(state.key))


def _with_key_of(state: TrainState, arrays: TrainState) -> TrainState:
    return arrays._replace(
        key=jax.random.wrap_key_data(arrays.key, impl=jax.random.key_impl(state.key))
    )


def _lasting(leaf: jax.Array) -> jax.Array:
    """The array, or a copy where training would write over it while a thread still writes it to a file.

    What is in an accelerator's memory Orbax has on the host when its `save` returns, and a second state may
    not fit there. What is in the host's memory it writes from where it is.
    """
    is_accelerator = jax.default_backend() != "cpu"
    return leaf if is_accelerator and leaf.sharding.memory_kind in (None, "device") else leaf.copy()


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
