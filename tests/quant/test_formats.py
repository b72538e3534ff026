"""Codes, scales and numbers of the formats are those of bitsandbytes, qwix and gguf."""

import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from tests.quant.matrices import NF4_CASES, large, matrix
from trainjax import quant, tree
from trainjax.types import Blocks

GOLDEN = np.load(helpers.GOLDEN / "quant.npz")
FORMATS = {
    "nf4": quant.nf4(),
    "nf4-single": quant.nf4(double=False),
    "int8": quant.int8(),
    "fp8": quant.fp8(),
    "fp8-tensor": quant.fp8(per_tensor=True),
    "q8_0": quant.q8_0(),
    "q4_1": quant.q4_1(),
}
BITS = {"nf4": 4.13, "nf4-single": 4.5, "int8": 8.25, "fp8": 8.25, "q8_0": 8.5, "q4_1": 5.0}
"""Per number of a matrix with 128 inputs."""


def encoded(name, rows):
    return jax.jit(FORMATS[name].encode)(rows)


@jax.jit
def dense(w):
    return w.dense()


@pytest.mark.parametrize("case", NF4_CASES)
def test_nf4_is_bitwise_that_of_bitsandbytes(case):
    w = encoded("nf4-single", matrix(*NF4_CASES[case]))
    codes, scales = GOLDEN[f"nf4/{case}/codes"], GOLDEN[f"nf4/{case}/scales"]
    ours = np.asarray(w.codes).ravel()
    np.testing.assert_array_equal(ours[: len(codes) - 1], codes[:-1])
    # An odd number of them leaves half a byte over, which bitsandbytes fills with the code of zero.
    np.testing.assert_array_equal(ours[len(codes) - 1], codes[-1])
    np.testing.assert_array_equal(np.asarray(w.scales).ravel(), scales)
    np.testing.assert_array_equal(np.asarray(dense(w)).T, GOLDEN[f"nf4/{case}/dense"])


def test_the_table_of_scales_is_bitwise_that_of_bitsandbytes():
    module = sys.modules["trainjax.quant.nf4"]  # the package's `nf4` is the function
    np.testing.assert_array_equal(module.DYNAMIC, GOLDEN["double/map"])


def test_codes_of_scales_are_bitwise_those_of_bitsandbytes():
    w = encoded("nf4", large())
    assert zlib.crc32(np.asarray(w.codes).tobytes()) == GOLDEN["double/checksum"]
    np.testing.assert_array_equal(
        np.asarray(w.scales.codes).ravel(), GOLDEN["double/codes"].ravel()
    )
    np.testing.assert_array_equal(np.asarray(w.scales.absmax), GOLDEN["double/outer"])
    # A mean of 4096 numbers in float32, which sums in another order round differently.
    np.testing.assert_allclose(np.asarray(w.scales.offset), GOLDEN["double/offset"], rtol=3e-7)


def test_codes_of_scales_differ_from_a_cpu_kernel_of_bitsandbytes_where_it_misses_the_nearest():
    ours = np.asarray(encoded("nf4", large()).scales.codes).ravel().astype(int)
    apart = np.abs(ours - GOLDEN["double/codes_float32"].ravel().astype(int))
    assert apart.max() == 1
    assert 0 < (apart > 0).mean() < 0.005


@pytest.mark.parametrize(("name", "mean", "relative"), [("nf4-single", 0.0728, 0.2033)])
def test_errors_on_normal_numbers_are_those_that_bitsandbytes_publishes(name, mean, relative):
    w = large()
    error = np.abs(np.asarray(dense(encoded(name, w))).T - w)
    assert error.mean() == pytest.approx(mean, rel=5e-3)
    assert (error / np.abs(w)).mean() == pytest.approx(relative, rel=5e-3)


def test_errors_with_quantised_scales_are_those_of_bitsandbytes():
    w = large()
    error = np.abs(np.asarray(dense(encoded("nf4", w))).T - w)
    assert error.mean() == pytest.approx(float(GOLDEN["double/mean_error"]), rel=1e-3)
    assert (error / np.abs(w)).mean() == pytest.approx(
        float(GOLDEN["double/relative_error"]), rel=1e-3
    )


def test_int8_is_that_of_bitsandbytes():
    w = encoded("int8", matrix(*NF4_CASES["rows"]).astype(np.float16))
    np.testing.assert_array_equal(np.asarray(w.codes), GOLDEN["int8/codes"])
    np.testing.assert_allclose(
        np.asarray(w.scales)[:, 0] * 127.0, GOLDEN["int8/largest"], rtol=2e-7
    )


@pytest.mark.parametrize(("name", "scope"), [("fp8", "output"), ("fp8-tensor", "tensor")])
def test_fp8_is_that_of_qwix(name, scope):
    w = encoded(name, matrix(*NF4_CASES["rows"]))
    codes = np.asarray(w.codes).view(np.uint8)
    np.testing.assert_array_equal(codes, GOLDEN[f"fp8/{scope}/codes"])
    np.testing.assert_allclose(np.asarray(w.scales), GOLDEN[f"fp8/{scope}/scales"], rtol=2e-7)


@pytest.mark.parametrize(("name", "kind"), [("q8_0", "Q8_0"), ("q4_1", "Q4_1")])
def test_blocks_are_bitwise_those_of_gguf(name, kind):
    made = encoded(name, matrix(*NF4_CASES["rows"]))
    raw = GOLDEN[f"{kind}/bytes"]
    kept = jax.jit(quant.stored().encode)(Blocks(raw.reshape(24, 4, -1), kind))
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    np.testing.assert_allclose(
        np.asarray(dense(kept)).T, GOLDEN[f"{kind}/dense"], rtol=0, atol=2e-7
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_second_rounding_changes_nothing(name):
    if name == "nf4":
        pytest.skip("the scales that were rounded are not the largest numbers of their blocks")
    once = np.asarray(dense(encoded(name, matrix(24, 128))))
    twice = np.asarray(dense(encoded(name, np.ascontiguousarray(once.T))))
    np.testing.assert_allclose(twice, once, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", BITS)
def test_the_bits_in_memory_are_those_promised(name):
    rows = np.ones((4096, 128), np.float32)
    shapes = jax.eval_shape(FORMATS[name].encode, rows)
    assert tree.num_bytes(shapes) * 8 / rows.size == pytest.approx(BITS[name], abs=0.01)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stack_is_quantised_as_each_of_its_matrices(name):
    rows = np.stack([matrix(24, 128), 3 * matrix(24, 128)[::-1]])
    stacked = encoded(name, rows)
    assert stacked.shape == (2, 128, 24)
    for index in range(2):
        one = encoded(name, rows[index])
        assert one.shape == (128, 24)
        part = jax.tree.map(lambda x, index=index: np.asarray(x)[index], stacked)
        assert jax.tree.structure(part) == jax.tree.structure(one)
        np.testing.assert_allclose(dense(part), dense(one), rtol=1e-6)
    mapped = jax.jit(jax.vmap(FORMATS[name].encode))(rows)
    np.testing.assert_allclose(dense(mapped), dense(stacked), rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_of_zeros_stays_one(name):
    zeros = encoded(name, np.zeros((24, 128), np.float32))
    np.testing.assert_array_equal(np.asarray(dense(zeros)), 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_narrow_weights_are_quantised_as_their_numbers_in_float32(name, dtype):
    rows = matrix(24, 128).astype(dtype)
    narrow, wide = encoded(name, rows), encoded(name, rows.astype(np.float32))
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", ["q8_0", "q4_1"])
def test_blocks_that_do_not_fit_are_refused(name):
    with pytest.raises(ValueError, match="its 48 inputs are not whole blocks of 32"):
        encoded(name, np.ones((4, 48), np.float32))
