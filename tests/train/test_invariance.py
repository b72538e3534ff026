"""The loss and the gradients do not depend on how a batch is cut, packed or spread over devices."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import trainjax as tj
from tests import helpers
from trainjax import parallel
from trainjax.losses import sft
from trainjax.nn import remat
from trainjax.peft import lora

LORA = lora(rank=2, target="kernel", alpha=4.0)  # of the head too
SIZES = {"vocab_size": 64}  # that the devices divide


@functools.cache
def setting(full: bool, mesh=None, **settings):
    """The loss, and the params or the adapter that it is of."""
    model = helpers.tiny(mesh=mesh, **SIZES, **settings)
    if full:
        return sft(tj.policy(model)), model.params
    return sft(tj.policy(model, LORA)), helpers.trained(LORA, model.params)


@functools.cache
def expected(full: bool):
    return helpers.loss_and_gradients(*setting(full), helpers.random_batch())


def assert_same(found, wanted, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=tolerance)
    helpers.assert_close(found[1], wanted[1], tolerance)


@pytest.mark.parametrize(("full", "accumulate"), [(False, 8), (True, 2)], ids=["lora", "full"])
def test_micro_batches_add_up_to_the_batch(full, accumulate):
    found = helpers.loss_and_gradients(*setting(full), helpers.random_batch(), accumulate)
    assert_same(found, expected(full))


def examples() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 61, size).astype(np.int32) for size in (7, 3, 9, 2, 5, 6)]


APART = [[i] for i in range(6)]
TOGETHER = [[0, 1, 4], [2, 3], [5], [], [], []]
"""With rows of nothing, so that both layouts go through one program."""


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_packed_rows_are_padded_rows(full):
    padded, packed = (helpers.packed(examples(), rows, seq=16) for rows in (APART, TOGETHER))
    wanted = helpers.loss_and_gradients(*setting(full), padded)
    assert_same(helpers.loss_and_gradients(*setting(full), packed), wanted)


def test_padding_changes_nothing():
    short, long = (helpers.packed(examples(), APART, seq=seq) for seq in (9, 16))
    wanted = helpers.loss_and_gradients(*setting(False), short)
    assert_same(helpers.loss_and_gradients(*setting(False), long), wanted)


SPLITS = [
    (False, (4, 1, 1), "attention"),
    (False, (1, 4, 1), "default"),
    (False, (2, 2, 1), "projections"),
    (False, (1, 2, 2), "nothing"),
    (True, (1, 1, 4), "default"),
    (True, (2, 1, 2), "default"),
]
"""Each axis alone and with each other, and every policy of what is kept for the backward pass."""
MORE_SPLITS = [
    (False, (2, 1, 1), "default"),
    (False, (1, 2, 1), "default"),
    (False, (1, 1, 2), "default"),
    (False, (2, 1, 2), "default"),
    (True, (1, 2, 2), "default"),
]
KEPT = {
    "default": {},
    "attention": {"remat": remat.attention},
    "projections": {"remat": remat.projections},
    "nothing": {"remat": None},
}


@pytest.mark.parametrize(
    ("full", "split", "kept"),
    [*SPLITS, *(pytest.param(*split, marks=pytest.mark.slow) for split in MORE_SPLITS)],
    ids=lambda value: {True: "full", False: "lora"}.get(value) or "".join(map(str, value)),
)
def test_any_split_over_devices_is_one_device_whatever_is_kept_for_the_backward_pass(
    full, split, kept
):
    """Split by data, fsdp and tensor; the batch in micro-batches too where the rows are split in two."""
    mesh = helpers.mesh_of(*split)
    batch = jax.device_put(helpers.random_batch(), parallel.rows(mesh))
    accumulate = 2 if split[0] == 2 else 1
    found = helpers.loss_and_gradients(*setting(full, mesh, **KEPT[kept]), batch, accumulate)
    assert_same(found, expected(full))


def test_sizes_that_devices_do_not_divide_are_right_all_the_same():
    """A vocabulary of 61 over two devices; one kv head over two."""
    sizes = {"num_key_value_heads": 1}
    mesh = helpers.mesh_of(1, 2, 2)
    one, two = (helpers.tiny(mesh=m, **sizes) for m in (None, mesh))
    wanted = helpers.loss_and_gradients(sft(tj.policy(one)), one.params, helpers.random_batch())
    batch = jax.device_put(helpers.random_batch(), parallel.rows(mesh))
    assert_same(helpers.loss_and_gradients(sft(tj.policy(two)), two.params, batch), wanted)
