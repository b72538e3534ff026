"""Rows over several devices: the loss and the gradients of whole rows, and what each device holds."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax import parallel, peft, tree
from trainjax.losses import sft
from trainjax.models import Model
from trainjax.nn import remat
from trainjax.ops.fold import Fold, fold
from trainjax.policies import Policy, policy

MESHES = {
    "data": {"data": 2, "fsdp": 1},
    "fsdp": {"fsdp": 2},
    "tensor": {"fsdp": 1, "tensor": 2},
    "alone": {"fsdp": 1},
}


def mesh(**sizes):
    return parallel.mesh(**sizes, sequence=4 // int(np.prod(list(sizes.values()))))


def batch_of(rows: int = 4, seq: int = 16):
    rng = np.random.default_rng(0)
    examples = [rng.integers(1, 61, length, np.int32) for length in (9, 6, 14, 11, 5, 16)]
    return helpers.packed(examples, [[0, 1], [2], [3, 4], [5]][:rows], seq)


def shared_prompts(seq: int):
    """A prompt of five tokens and two completions in each row."""
    rng = np.random.default_rng(1)
    segments = np.tile([1] * 5 + [2] * 6 + [3] * 5 + [0] * (seq - 16), (4, 1)).astype(np.int32)
    places = [*range(5), *range(5, 11), *range(5, 10), *[0] * (seq - 16)]
    return {
        "tokens": rng.integers(1, 61, (4, seq), np.int32),
        "segments": segments,
        "prefixes": np.where(segments > 1, 1, 0).astype(np.int32),
        "positions": np.tile(places, (4, 1)).astype(np.int32),
        "weights": (segments > 1) / np.float32(44),
    }


def laid_out(grid, keep, **settings) -> Model:
    """The tiny model over a mesh, or whole on one device where that is None."""
    whole = helpers.tiny(**settings)
    module = whole.module.clone(mesh=grid, remat=keep)
    return dataclasses.replace(whole, module=module, params=parallel.place(whole.params, grid))


@jax.jit
def of_adapter(policy: Policy, adapter, batch):
    """The loss, and the gradients of the adapter."""
    return jax.value_and_grad(lambda adapter: sft(policy)(adapter, batch, None)[0])(adapter)


@jax.jit
def of_everything(policy: Policy, adapter, batch):
    """The loss; the gradients of adapter and base, and what weights report of the forward pass."""

    def loss(trained):
        own = dataclasses.replace(policy, base=trained["base"])
        value, _ = sft(own)(trained["adapter"], batch, None)
        return value, own.reports(trained["adapter"], batch)

    trained = {"adapter": adapter, "base": policy.base}
    (value, reports), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
    return value, gradients | {"reports": reports}


def assert_like_whole_rows(f, method, sizes, keep, batches, std=0.1, **settings) -> str:
    """`f` finds over the mesh what it finds on one device; returns the text of its program there."""
    grid = mesh(**sizes)

    def given(model):
        start = method.init(jax.random.key(0), model.params)
        return policy(model, method), helpers.randomised(start, std)

    alone, split = given(laid_out(None, None, **settings)), given(laid_out(grid, keep, **settings))
    placed = [jax.device_put(batch, parallel.rows(grid)) for batch in batches]
    program = f.lower(*split, placed[0]).compile()
    for batch, parts in zip(batches, placed, strict=True):
        expected, found = jax.device_get((f(*alone, batch), program(*split, parts)))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        helpers.assert_close(*map(tree.flatten, (found[1], expected[1])), 1e-5)
    return program.as_text()


@pytest.mark.parametrize(("split", "keep"), [("data", remat.full), ("alone", None)])
def test_rows_and_their_shared_prompts_are_as_whole_and_nothing_is_whole_on_a_device(split, keep):
    """No array of the program has more tokens than a device's own in the width of a layer."""
    settings = {"num_hidden_layers": 3}  # 3 layers' inputs are kept
    packed = batch_of(seq=20)
    batches = packed | {"prefixes": np.zeros((4, 20), np.int32)}, shared_prompts(20)
    method = peft.lora(rank=2)
    text = assert_like_whole_rows(of_adapter, method, MESHES[split], keep, batches, **settings)
    widths = {32, 48}
    sizes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    held = {np.prod(shape[:-1]) for shape in sizes if len(shape) > 1 and shape[-1] in widths}
    tokens = 4 * 20
    assert tokens // 4 in held  # a device's own
    assert not held & {tokens, tokens // 2, 2 * tokens}
    assert "all-gather" in text  # of keys and values


@pytest.mark.parametrize(
    ("method", "split", "keep", "settings"),
    [
        (peft.prefix(num_virtual_tokens=3), "tensor", remat.attention, {}),
        (
            peft.molora(rank=2, experts=2),
            "fsdp",
            remat.projections,
            {"sliding_window": 5, "model_type": "mistral"},
        ),
    ],
    ids=["prefix", "molora"],
)
def test_every_gradient_is_that_of_whole_rows_and_reports_are_in_their_order(
    method, split, keep, settings
):
    """Of the adapter and of the base, as in full training."""
    batches = [batch_of()]
    assert_like_whole_rows(of_everything, method, MESHES[split], keep, batches, **settings)


def test_adapters_by_row_follow_the_parts_of_their_rows():
    method = peft.switched(3, rank=2)
    batch = batch_of() | {"adapters": np.array([2, 0, -1, 1], np.int32)}
    assert_like_whole_rows(of_adapter, method, MESHES["data"], remat.full, [batch], std=0.05)


def test_folded_rows_are_the_devices_own_tokens():
    grid = mesh(data=2, fsdp=1)
    x = jnp.arange(4 * 6).reshape(4, 6)
    folded = fold(grid, 4, 6)
    assert (folded.parts, folded.groups) == (2, 4)
    found = jax.jit(folded)(x)
    rows = [
        shard.data.tolist() for shard in sorted(found.addressable_shards, key=lambda s: s.device.id)
    ]
    assert rows == [
        [[0, 1, 2], [6, 7, 8]],
        [[3, 4, 5], [9, 10, 11]],
        [[12, 13, 14], [18, 19, 20]],
        [[15, 16, 17], [21, 22, 23]],
    ]
    np.testing.assert_array_equal(jax.jit(lambda x: folded.undo(folded(x)))(x), x)


def test_rows_that_do_not_divide_stay_whole():
    grid = mesh(data=2, fsdp=1)
    assert fold(grid, 4, 7) == Fold(grid, 2, 1)
    assert fold(grid, 3, 8) == fold(None, 4, 8) == Fold()
