"""Models whose layers are quantised: loading, adapters over them, training, saving, and what is refused."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import trainjax as tj
from tests import helpers
from tests.quant.test_formats import FORMATS
from trainjax import parallel, policies, quant, tree
from trainjax.io import gguf
from trainjax.losses import sft
from trainjax.models import Model, load, load_adapter, random_model, save_adapter, save_model
from trainjax.peft import Lora, lora
from trainjax.train import init, make_step

NAMES = ["nf4", "nf4-single", "int8", "fp8", "q8_0", "q4_1"]


PLACES = {
    "attention/query": "nf4",
    "attention/key": "int8",
    "attention/value": "fp8",
    "attention/output": "q8_0",
    "mlp/gate": "q4_1",
    "mlp/up": "nf4-single",
    "mlp/down": "nf4",
}
"""Every format in a model of its own: one program asks about them all."""
assert set(PLACES.values()) == set(NAMES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with matrices that every format's blocks fit."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, helpers.tiny(intermediate_size=64))
    return folder


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose matrices are all of a shape, so that a format is a program and not four."""
    folder = tmp_path_factory.mktemp("square") / "model"
    sides = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4}
    save_model(folder, helpers.tiny(**sides))
    return folder


@pytest.fixture(scope="module")
def original(saved: Path, square: Path) -> Callable[[str], Model]:
    """Either as it was saved."""
    return functools.cache(lambda name: load({"saved": saved, "square": square}[name]))


@pytest.fixture(scope="module")
def in_format(square: Path) -> Callable[[str], Model]:
    """The square one, quantised while loading."""
    return functools.cache(lambda name: load(square, quantise=FORMATS[name]))


@pytest.fixture(scope="module")
def quantised(saved: Path) -> Model:
    """The other one in NF4."""
    return load(saved, quantise=FORMATS["nf4"])


@pytest.fixture(scope="module")
def mixed() -> Model:
    """Each matrix in another format."""
    model = helpers.tiny(intermediate_size=64)
    params = model.params
    for place, name in PLACES.items():
        params = quant.quantise(params, FORMATS[name], target=f"layers/{place}/kernel")
    return model.with_params(params)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A model's folder, for a test to change."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def matrices(params):
    return {name: w for name, w in tree.flatten(params).items() if name.endswith("kernel")}


def assert_quantised_alike(found, original, to, target):
    """Of the matrices that match."""
    found = tree.select(found, target)
    expected = tree.select(quant.quantise(original, to, target=target), target)
    assert len(expected) == 3
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        wide = np.float64 if jnp.issubdtype(ours.dtype, jnp.floating) else ours.dtype
        np.testing.assert_allclose(np.asarray(ours, wide), np.asarray(theirs, wide), rtol=3e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_quantised_while_loading_is_the_model_quantised_afterwards(
    in_format, original, name
):
    found, target = in_format(name).params, "layers/.*(output|up|down)/kernel"
    assert_quantised_alike(found, original("square").params, FORMATS[name], target)
    assert len({type(w) for w in matrices(found["layers"]).values()}) == 1


def test_matrices_of_any_sides_are_quantised_while_loading_as_afterwards(quantised, original):
    target = "layers/.*(key|up|down)/kernel"
    assert_quantised_alike(quantised.params, original("saved").params, quant.nf4(), target)


def test_only_the_matrices_of_the_layers_are_quantised(quantised):
    for name, w in tree.flatten(quantised.params).items():
        inside = name.startswith("layers/") and name.endswith("kernel")
        assert isinstance(w, quant.Nf4 if inside else jax.Array), name


def test_the_function_is_that_of_the_dense_params(mixed):
    tokens = np.arange(12)[None]
    dense = mixed.with_params(quant.dense(mixed.params))
    np.testing.assert_allclose(mixed.logits(tokens), dense.logits(tokens), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_is_that_of_the_original_weights(in_format, original, square, name):
    mark = original("square").fingerprint
    assert in_format(name).fingerprint == mark
    assert load(square, quantise=FORMATS[name], dtype=jnp.bfloat16).fingerprint == mark


@pytest.mark.parametrize("name", ["nf4", "fp8"])
def test_a_quantised_model_over_a_mesh_lies_by_the_rules_and_is_the_same(in_format, square, name):
    mesh, alone = helpers.mesh_of(1, 2, 2), in_format(name)
    model = load(square, mesh=mesh, quantise=FORMATS[name])
    ruled = 0
    for path, w in matrices(model.params).items():
        if path.startswith("layers/") and w.codes.shape[-2] == w.shape[-1]:
            assert w.sharding.spec == parallel.spec(path, w.shape, mesh), path
            ruled += 1
    assert ruled == len(PLACES)
    half = load(square, mesh=mesh, quantise=FORMATS[name], dtype=jnp.bfloat16)
    assert model.fingerprint == half.fingerprint == alone.fingerprint
    tokens, dense = np.arange(12)[None], alone.with_params(quant.dense(alone.params))
    np.testing.assert_allclose(model.logits(tokens), dense.logits(tokens), rtol=0, atol=2e-3)


LORA = lora(rank=4)


def loss_of(model, method=LORA):
    return sft(policies.policy(model, method))


@jax.jit
def gradients(loss, adapter, batch):
    """The loss too."""
    return jax.value_and_grad(lambda adapter: loss(adapter, batch)[0])(adapter)


def test_gradients_of_an_adapter_are_those_over_the_dense_base(mixed):
    dense = mixed.with_params(quant.dense(mixed.params))
    adapter, batch = helpers.trained(LORA, dense.params, std=0.05), helpers.random_batch()
    found, expected = (gradients(loss_of(model), adapter, batch) for model in (mixed, dense))
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    helpers.assert_close(tree.flatten(found[1]), tree.flatten(expected[1]), 1e-4)


def test_an_adapter_starts_over_a_quantised_base_as_over_the_original(quantised, original):
    first, second = (
        LORA.init(jax.random.key(0), model.params) for model in (original("saved"), quantised)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_an_adapter_lies_as_the_quantised_matrix_does():
    """One whose outputs are over `tensor`, and one whose inputs are."""
    mesh = helpers.mesh_of(1, 2, 2)
    plain = {
        "layers": {
            "attention": {"query": {"kernel": np.zeros((2, 256, 256), np.float32)}},
            "mlp": {"down": {"kernel": np.zeros((2, 512, 256), np.float32)}},
        }
    }
    plain = parallel.place(plain, mesh)
    expected, found = (
        LORA.init(jax.random.key(0), params)
        for params in (plain, quant.quantise(plain, quant.nf4()))
    )
    lies = lambda leaf: leaf.sharding  # noqa: E731
    assert jax.tree.map(lies, found) == jax.tree.map(lies, expected)
    assert len(set(jax.tree.leaves(jax.tree.map(lies, found)))) > 2


def test_twenty_steps_leave_the_base_bit_by_bit_and_trace_once(quantised):
    model, method = quantised, LORA
    before = jax.tree.map(np.array, model.params)
    traces = []

    def counted(inputs, params, batch, key):
        traces.append(1)
        return inputs(params, batch, key)

    loss, tx = tj.types.Loss(counted, loss_of(model, method)), optax.adam(1e-2)
    state, step = init(method.init(jax.random.key(0), model.params), tx), make_step(tx)
    losses = []
    for _ in range(20):
        state, metrics = step(state, loss, helpers.random_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    assert len(traces) == 1
    jax.tree.map(np.testing.assert_array_equal, model.params, before)


def test_one_layer_at_most_is_dense(mixed):
    adapter = LORA.init(jax.random.key(0), mixed.params)
    program = gradients.trace(loss_of(mixed), adapter, helpers.random_batch())
    shapes = helpers.shapes_in(program.jaxpr)
    stacks = [w.shape for w in matrices(mixed.params["layers"]).values()]
    for layers, fan_in, fan_out in stacks:
        assert {(layers, fan_in, fan_out), (layers, fan_out, fan_in)}.isdisjoint(shapes)
        assert (fan_out, fan_in) in shapes  # one layer's


def test_what_the_gradient_takes_is_codes_and_a_layer_or_two():
    """Memory is planned before the code is made, so that need not be optimised; nor are weights needed."""
    layers = 16
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers}
    model = random_model(helpers.TINY | sizes, jax.random.key(0))
    method, batch = lora(rank=2), helpers.random_batch(rows=1, seq=8)
    adapter = method.init(jax.random.key(0), model.params)

    def encoded(w):
        return jax.eval_shape(lambda w: quant.nf4().encode(jnp.swapaxes(w, -1, -2)), w)

    def memory(params):
        loss = loss_of(model.with_params(params), method)
        return gradients.lower(loss, adapter, batch).compile().memory_analysis()

    inside = {name: encoded(w) for name, w in tree.select(model.params, quant.LAYERS).items()}
    plain, kept = memory(model.params), memory(tree.replace(model.params, inside))
    dense = tree.num_bytes(matrices(model.params["layers"]))
    assert plain.argument_size_in_bytes - kept.argument_size_in_bytes > 0.85 * dense
    assert kept.temp_size_in_bytes - plain.temp_size_in_bytes < 2 * dense / layers


def test_a_merged_adapter_is_that_over_the_dequantised_base(quantised, original, tmp_path):
    adapter = helpers.trained(LORA, original("saved").params, std=0.05)
    merged = LORA.merge(quantised.params, adapter)
    assert all(isinstance(w, jax.Array) for w in matrices(merged).values())
    tokens = np.arange(12)[None]
    attached = quantised.with_params(LORA.attach(quantised.params, adapter))
    save_model(tmp_path / "merged", quantised, merged)
    np.testing.assert_allclose(
        load(tmp_path / "merged").logits(tokens), attached.logits(tokens), rtol=0, atol=5e-3
    )


def test_an_adapter_of_a_quantised_base_is_known_to_be_of_the_original(
    in_format, original, square, tmp_path
):
    adapter = helpers.trained(LORA, original("square").params, std=0.05)
    save_adapter(tmp_path / "adapter", in_format("nf4"), LORA, adapter)
    _, found = load_adapter(tmp_path / "adapter", original("square"))
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    over = load(square, quantise=FORMATS["int8"], adapter=tmp_path / "adapter")
    assert isinstance(over.params["layers"]["mlp"]["up"]["kernel"], Lora)


@pytest.mark.parametrize("format_of", [quant.nf4, quant.stored], ids=["nf4", "stored"])
def test_params_in_a_format_are_not_quantised_again(quantised, format_of):
    message = "layers/attention/key/kernel is a Nf4 already; only an array can be quantised"
    with pytest.raises(ValueError, match=message):
        quant.quantise(quantised.params, format_of())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_named(folder, bad):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = bad
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} holds a number that is not finite"):
        load(folder, quantise=FORMATS["nf4"])
    with pytest.raises(ValueError, match="layers/mlp/up/kernel holds a number that is not finite"):
        quant.quantise(load(folder).params, quant.nf4())


def test_integers_are_refused_by_name(folder):
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is stored as I8: codes of a quantised model"):
        load(folder, quantise=FORMATS["nf4"])
    params = {"layers": {"kernel": jnp.ones((64, 64), jnp.int32)}}
    with pytest.raises(ValueError, match="layers/kernel is of int32; only floating-point"):
        quant.quantise(params, quant.int8())


def test_blocks_that_do_not_fit_are_refused_by_name(tmp_path):
    save_model(tmp_path / "model", helpers.tiny())  # 48 in the middle
    message = "model.layers.0.mlp.down_proj.weight cannot be quantised: its 48 inputs are not whole"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model", quantise=quant.q8_0())
    with pytest.raises(ValueError, match="layers/mlp/down/kernel cannot be quantised: its 48"):
        quant.quantise(helpers.tiny().params, quant.q8_0())


def test_a_checkpoint_of_another_library_in_few_bits_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantised already .*bitsandbytes.*original"):
        load(folder, quantise=FORMATS["nf4"])


def test_quantised_params_are_not_saved_as_a_model(quantised, tmp_path):
    model = quantised
    with pytest.raises(ValueError, match="is a Nf4, not an array; merge the adapter first, or"):
        save_model(tmp_path / "out", model)
    save_model(tmp_path / "out", model, quant.dense(model.params))
    assert load(tmp_path / "out").fingerprint != model.fingerprint  # other weights


def test_a_folder_has_nothing_stored_in_blocks(folder):
    with pytest.raises(ValueError, match=r"is not in blocks: only a .gguf file's .* Q4_1 or Q8_0"):
        load(folder, quantise=quant.stored())


@pytest.mark.real
@pytest.mark.slow
def test_the_blocks_of_a_gguf_file_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(gguf, "read_header", functools.cache(gguf.read_header))
    monkeypatch.setattr(gguf.GgufFile, "tokenizer", lambda self: None)  # which takes seconds
    file = helpers.smollm2_gguf()
    kept, model = load(file, quantise=quant.stored()), load(file)
    assert tree.num_bytes(kept.params["layers"]) < 0.16 * tree.num_bytes(model.params["layers"])
    assert kept.fingerprint == model.fingerprint

    @jax.jit
    def error(w, dense):
        return jnp.abs(w.dense() - dense).max() / jnp.abs(dense).max()

    for name, w in matrices(kept.params["layers"]).items():
        assert error(w, tree.flatten(model.params["layers"])[name]) <= 1e-7, name
    tokens = np.arange(100, 132)[None]
    np.testing.assert_allclose(kept.logits(tokens), model.logits(tokens), rtol=0, atol=2e-3)


def test_a_reward_model_over_a_quantised_base(quantised, saved, tmp_path):
    params = tj.init_scorer(jax.random.key(0), quantised, LORA)
    tj.save_scorer(tmp_path / "reward", quantised, LORA, params)
    found, _, _ = tj.load_scorer(saved, quantise=FORMATS["nf4"], adapter=tmp_path / "reward")
    assert isinstance(found.params["layers"]["mlp"]["up"]["kernel"], quant.Nf4)
    shutil.rmtree(tmp_path / "reward")
