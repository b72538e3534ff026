import errno
import logging
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainjax import parallel, train
from trainjax.train import Checkpoints
from trainjax.train.checkpoint import _lasting, may_be_repeated

TX = optax.adamw(1e-2)


def fresh(size=8, mesh=None):
    params = {"layers": {"a": jnp.arange(4.0 * size).reshape(4, size), "b": jnp.ones((4, 2))}}
    return train.init(parallel.place(params, mesh), TX, key=7)


def after(state, steps):
    for _ in range(steps):
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = TX.update(state.params, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state


def equal(a, b):
    arrays = (train.checkpoint._as_arrays(state) for state in (a, b))
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), *arrays)
    return all(jax.tree.leaves(same))


def saved(path, steps=(1, 2, 3), **options):
    """Checkpoints of a state after each of `steps`, and those states."""
    checkpoints, states = Checkpoints(path, **options), {}
    for step in steps:
        states[step] = after(fresh(), step)
        checkpoints.save(states[step], {"batches": {"batch": step}})
    checkpoints.close()
    return states


def test_a_state_comes_back_bitwise_with_its_json(tmp_path):
    states = saved(tmp_path)
    found = Checkpoints(tmp_path).restore(fresh())
    assert (found.step, found.extra) == (3, {"batches": {"batch": 3}})
    assert equal(found.state, states[3])
    draw = lambda state: jax.random.uniform(state.key)  # noqa: E731
    assert draw(found.state) == draw(states[3])


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert Checkpoints(tmp_path).restore(fresh()) is None


def test_the_newest_are_kept(tmp_path):
    saved(tmp_path, steps=range(1, 7), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "6"]


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1.0, x), donate_argnums=0)
    state = fresh(size=200_000)
    expected = np.asarray(state.params["layers"]["a"]).copy()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    for _ in range(20):
        state = state._replace(params=step(state.params))
    jax.block_until_ready(state)
    checkpoints.close()
    found = Checkpoints(tmp_path).restore(fresh(size=200_000))
    np.testing.assert_array_equal(found.state.params["layers"]["a"], expected)


def test_no_accelerators_memory_holds_a_second_state(monkeypatch):
    """Its arrays are on the host when `save` returns; those of the host are written from where they are."""
    on_device = jnp.ones(4)
    on_host = jax.device_put(on_device, on_device.sharding.with_memory_kind("pinned_host"))
    is_copied = lambda leaf: _lasting(leaf).unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()  # noqa: E731
    assert is_copied(on_device)
    assert is_copied(on_host)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not is_copied(on_device)
    assert is_copied(on_host)
    assert _lasting(on_host).sharding == on_host.sharding


def test_a_state_that_is_not_copied_comes_back_bitwise(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    states = saved(tmp_path)
    monkeypatch.undo()
    assert equal(Checkpoints(tmp_path).restore(fresh()).state, states[3])


@pytest.mark.parametrize("target", [{"fsdp": 4}, {"data": 2, "fsdp": 2}, {"fsdp": 1, "tensor": 4}])
def test_a_state_is_restored_onto_another_mesh(tmp_path, target):
    states = saved(tmp_path, steps=[2])
    mesh = parallel.mesh(**target)
    found = Checkpoints(tmp_path).restore(fresh(mesh=mesh)).state
    assert equal(found, states[2])
    assert found.params["layers"]["a"].sharding.mesh == mesh


def files(path):
    return sorted(file for file in (path / "3").rglob("*") if file.is_file())


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file):
    file.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, damage):
    """Whichever file is hit. Orbax's own bookkeeping at the top is not needed to read a checkpoint."""
    states = saved(tmp_path / "0")
    names = [file.relative_to(tmp_path / "0") for file in files(tmp_path / "0")]
    chosen = [name for name in names if len(name.parts) > 2 or name.name == "manifest.json"]
    for i, name in enumerate(chosen[:: max(1, len(chosen) // 4)], 1):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "0", folder)
        damage(folder / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = Checkpoints(folder).restore(fresh())
        assert found.step == 2, name
        assert equal(found.state, states[2])
        assert f"{folder / '3'} is damaged" in caplog.text


def test_no_changed_bit_of_the_list_of_checksums_is_overlooked(tmp_path):
    saved(tmp_path, steps=[3])
    manifest, checkpoints = tmp_path / "3" / "manifest.json", Checkpoints(tmp_path)
    whole = manifest.read_bytes()
    assert checkpoints._damage(3) == ""
    for at in range(len(whole)):
        for bit in (1, 128):
            manifest.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            assert checkpoints._damage(3), (at, bit)


@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_bookkeeping_of_orbax_is_not_needed(tmp_path, damage):
    states = saved(tmp_path)
    damage(tmp_path / "3" / "_CHECKPOINT_METADATA")
    found = Checkpoints(tmp_path).restore(fresh())
    assert found.step == 3
    assert equal(found.state, states[3])


def test_a_step_that_is_damaged_a_second_time_is_put_aside_again(tmp_path):
    states = saved(tmp_path)
    for count in (1, 2):
        truncate(tmp_path / "3" / "manifest.json")
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.restore(fresh()).step == 2
        assert len(list(tmp_path.glob("3.damaged*"))) == count
        checkpoints.save(states[3], {})
        checkpoints.close()


def test_training_goes_on_past_a_damaged_checkpoint(tmp_path):
    states = saved(tmp_path)
    truncate(next(file for file in files(tmp_path) if file.parent.name == "d"))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(fresh()).step == 2
    checkpoints.save(states[3], {})
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(fresh()).step == 3


def test_if_all_are_damaged_it_says_so(tmp_path):
    saved(tmp_path, steps=[3])
    truncate(tmp_path / "3" / "manifest.json")
    for _ in range(2):  # nothing is moved, so a second try does not begin anew either
        with pytest.raises(ValueError, match="all 1 checkpoints in .* are damaged"):
            Checkpoints(tmp_path).restore(fresh())


def test_a_half_written_checkpoint_is_never_chosen(tmp_path):
    saved(tmp_path)
    (tmp_path / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert Checkpoints(tmp_path).restore(fresh()).step == 3


def test_saving_leaves_it_to_the_loop_to_ask_whether_to_stop(tmp_path, monkeypatch):
    """Processes agree on one call: one that Orbax made in `save` would be missing from the loop's."""
    asked = []
    name = "orbax.checkpoint.checkpoint_manager.utils.reached_preemption"
    monkeypatch.setattr(name, lambda step: bool(asked.append(step)))
    saved(tmp_path)
    assert asked == []


def test_a_state_of_another_shape_is_refused_by_name(tmp_path):
    saved(tmp_path)
    with pytest.raises(
        ValueError, match=r"opt_state/.*/mu/layers/a is \[4, 8\], this run has \[4, 9\]"
    ):
        Checkpoints(tmp_path).restore(fresh(size=9))


FULL_DISK = """
import resource, sys
import jax, jax.numpy as jnp, optax
from trainjax import train
noise = lambda size: jax.random.normal(jax.random.key(0), (size,))
checkpoints = train.Checkpoints(sys.argv[1])
state = lambda step, size: train.init({"a": noise(size)}, optax.sgd(0.1))._replace(step=jnp.int32(step))
checkpoints.save(state(1, 10), {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)  # longer files fail, as on a full disk
try:
    checkpoints.save(state(2, 1_000_000), {})
    checkpoints.wait()
except OSError as error:
    print(error)
print(train.Checkpoints(sys.argv[1]).restore(state(0, 10)).step)
"""


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_stays(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said, step = done.stdout.splitlines()
    assert said.startswith(f"the checkpoint of step 2 could not be written to {tmp_path}: ")
    assert "File too large" in said
    assert step == "1"


AWAY = """
import errno, logging, resource, sys, time
import jax, jax.numpy as jnp, optax
from trainjax import retries, train
from trainjax.train.fit import _finish
retries.TRANSIENT.add(errno.EFBIG)
noise = lambda size: jax.random.normal(jax.random.key(0), (size,))
checkpoints = train.Checkpoints(sys.argv[1])
state = lambda step, size: train.init({"a": noise(size)}, optax.sgd(0.1))._replace(step=jnp.int32(step))
limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def back(pause):
    print("pause", pause)
    limit(resource.RLIM_INFINITY if pause == 2.0 else 100_000)
time.sleep = back
limit(100_000)
checkpoints.save(state(1, 1_000_000), {})
checkpoints.save(state(2, 1_000_000), {})  # takes the place of the first
_finish(checkpoints, lambda: checkpoints.save(state(2, 1_000_000), {}))
time.sleep(0.0)
checkpoints.close()
print(train.Checkpoints(sys.argv[1]).restore(state(0, 1_000_000)).step)
"""


def test_a_filesystem_that_is_away_for_a_moment_is_asked_again(tmp_path):
    command = [sys.executable, "-c", AWAY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "2"
    assert "the next one takes its place" in done.stderr
    assert "writing it again" in done.stderr


def test_several_processes_do_not_write_again_what_one_of_them_could_not(monkeypatch):
    away = OSError(errno.EIO, "Input/output error")
    assert may_be_repeated(away)
    assert not may_be_repeated(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not may_be_repeated(away)
