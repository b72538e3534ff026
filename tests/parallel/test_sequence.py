"""Rows over several devices: the loss and the gradients of whole rows, and what each device holds."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from trainjax import parallel, peft
from trainjax.losses import sft
from trainjax.nn import remat
from trainjax.ops.fold import Fold, fold
from trainjax.policies import policy

METHODS = {
    "lora": peft.lora(rank=2),
    "prefix": peft.prefix(num_virtual_tokens=3),
    "molora": peft.molora(rank=2, experts=2),
    "full": None,
}
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


def trace(method, mesh, batch, std=0.1, **settings):
    model = helpers.tiny(mesh=mesh, **settings)
    params = model.params
    if method is not None:
        params = helpers.randomised(method.init(jax.random.key(0), params), std)
    if mesh is not None:
        batch = jax.device_put(batch, parallel.rows(mesh))
    return helpers.loss_and_gradients(sft(policy(model, method)), params, batch)


@pytest.mark.parametrize(
    ("method", "split", "settings"),
    [
        ("lora", "data", {"remat": remat.full}),
        ("lora", "alone", {"remat": None}),
        ("full", "tensor", {"remat": remat.attention}),
        (
            "full",
            "fsdp",
            {"remat": remat.projections, "sliding_window": 5, "model_type": "mistral"},
        ),
        ("prefix", "data", {"remat": remat.full}),
        ("molora", "fsdp", {"remat": remat.full}),
    ],
)
def test_loss_and_gradients_are_those_of_whole_rows(method, split, settings):
    batch = batch_of()
    expected = trace(METHODS[method], None, batch, **settings)
    found = trace(METHODS[method], mesh(**MESHES[split]), batch, **settings)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    helpers.assert_close(found[1], expected[1], 1e-5)


def test_completions_that_share_a_prompt_see_it_across_devices():
    rng = np.random.default_rng(1)
    segments = np.tile([1] * 5 + [2] * 6 + [3] * 5, (4, 1)).astype(np.int32)
    batch = {
        "tokens": rng.integers(1, 61, (4, 16), np.int32),
        "segments": segments,
        "prefixes": np.where(segments > 1, 1, 0).astype(np.int32),
        "positions": np.tile([*range(5), *range(5, 11), *range(5, 10)], (4, 1)).astype(np.int32),
        "weights": (segments > 1) / np.float32(44),
    }
    expected = trace(METHODS["lora"], None, batch)
    found = trace(METHODS["lora"], mesh(fsdp=2), batch)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    helpers.assert_close(found[1], expected[1], 1e-5)


def test_adapters_by_row_follow_the_parts_of_their_rows():
    method = peft.switched(3, rank=2)
    batch = batch_of() | {"adapters": np.array([2, 0, -1, 1], np.int32)}
    expected = trace(method, None, batch, std=0.05)
    found = trace(method, mesh(data=2, fsdp=1), batch, std=0.05)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    helpers.assert_close(found[1], expected[1], 1e-5)


def test_reports_are_in_the_order_of_the_tokens():
    batch = batch_of()
    method = METHODS["molora"]

    def reports(mesh):
        model = helpers.tiny(mesh=mesh)
        adapter = helpers.randomised(method.init(jax.random.key(0), model.params), 0.1)
        return jax.jit(policy(model, method).reports)(adapter, batch)

    helpers.assert_close(reports(mesh(fsdp=2)), reports(None), 1e-5)


def test_every_device_computes_its_own_tokens_and_nothing_is_whole():
    """No array of the compiled step has more tokens than a device's own in the width of a layer."""
    model = helpers.tiny(
        mesh=mesh(data=2, fsdp=1), num_hidden_layers=3
    )  # 3 layers' inputs are kept
    method = METHODS["lora"]
    adapter = method.init(jax.random.key(0), model.params)
    batch = jax.device_put(batch_of(seq=20), parallel.rows(model.module.mesh))
    loss = sft(policy(model, method))
    text = jax.jit(jax.grad(lambda p: loss(p, batch, None)[0])).lower(adapter).compile().as_text()
    widths = {32, 48}
    sizes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    held = {np.prod(shape[:-1]) for shape in sizes if len(shape) > 1 and shape[-1] in widths}
    tokens = 4 * 20
    assert tokens // 4 in held  # a device's own
    assert not held & {tokens, tokens // 2, 2 * tokens}
    assert "all-gather" in text  # of keys and values


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
