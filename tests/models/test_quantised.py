"""Models whose layers are quantised: loading, adapters over them, training, saving, and what is refused."""

from __future__ import annotations

import json
import shutil
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
from trainjax.losses import sft
from trainjax.models import load, load_adapter, random_model, save_adapter, save_model
from trainjax.peft import Lora, lora
from trainjax.train import init, make_step

NAMES = ["nf4", "nf4-single", "int8", "fp8", "q8_0", "q4_1"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with matrices that every format's blocks fit."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(folder, helpers.tiny(intermediate_size=64))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """It again, for a test to change."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def matrices(params):
    return {name: w for name, w in tree.flatten(params).items() if name.endswith("kernel")}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_quantised_while_loading_is_the_model_quantised_afterwards(folder, name):
    found = load(folder, quantise=FORMATS[name]).params
    expected = quant.quantise(load(folder).params, FORMATS[name])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        wide = np.float64 if jnp.issubdtype(ours.dtype, jnp.floating) else ours.dtype
        np.testing.assert_allclose(np.asarray(ours, wide), np.asarray(theirs, wide), rtol=3e-7)


def test_only_the_matrices_of_the_layers_are_quantised(folder):
    params = load(folder, quantise=quant.nf4()).params
    for name, w in tree.flatten(params).items():
        inside = name.startswith("layers/") and name.endswith("kernel")
        assert isinstance(w, quant.Nf4 if inside else jax.Array), name


@pytest.mark.parametrize("name", NAMES)
def test_the_function_is_that_of_the_dense_params(folder, name):
    model = load(folder, quantise=FORMATS[name])
    tokens = np.arange(12)[None]
    dense = model.with_params(quant.dense(model.params))
    np.testing.assert_allclose(model.logits(tokens), dense.logits(tokens), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_is_that_of_the_original_weights(folder, name):
    mark = load(folder).fingerprint
    assert load(folder, quantise=FORMATS[name]).fingerprint == mark
    options = {"dtype": jnp.bfloat16, "mesh": helpers.mesh_of(1, 2, 2)}
    assert load(folder, quantise=FORMATS[name], **options).fingerprint == mark


@pytest.mark.parametrize("name", ["nf4", "fp8"])
def test_a_quantised_model_over_a_mesh_lies_by_the_rules_and_is_the_same(folder, name):
    mesh, alone = helpers.mesh_of(1, 2, 2), load(folder, quantise=FORMATS[name])
    model = load(folder, mesh=mesh, quantise=FORMATS[name])
    for path, w in matrices(model.params).items():
        if path.startswith("layers/") and w.codes.shape[-2] == w.shape[-1]:
            assert w.sharding.spec == parallel.spec(path, w.shape, mesh), path
    tokens = np.arange(12)[None]
    np.testing.assert_allclose(model.logits(tokens), alone.logits(tokens), rtol=0, atol=2e-3)


def loss_of(model, method):
    return sft(policies.policy(model, method))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_an_adapter_are_those_over_the_dense_base(folder, name):
    model, method = load(folder, quantise=FORMATS[name]), lora(rank=4)
    dense = model.with_params(quant.dense(model.params))
    adapter = helpers.trained(method, dense.params, std=0.05)
    batch = helpers.random_batch()
    found = helpers.loss_and_gradients(loss_of(model, method), adapter, batch)
    expected = helpers.loss_and_gradients(loss_of(dense, method), adapter, batch)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    helpers.assert_close(found[1], expected[1], 1e-4)


def test_an_adapter_starts_over_a_quantised_base_as_over_the_original(folder):
    original, quantised = load(folder), load(folder, quantise=quant.nf4())
    first, second = (
        lora(rank=4).init(jax.random.key(0), model.params) for model in (original, quantised)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_an_adapter_lies_as_the_quantised_matrix_does():
    mesh = helpers.mesh_of(1, 2, 2)
    sides = {"hidden_size": 256, "intermediate_size": 512}
    model = random_model(helpers.TINY | sides, jax.random.key(0), mesh=mesh)
    quantised = quant.quantise(model.params, quant.nf4())
    expected, found = (lora(rank=4).init(jax.random.key(0), p) for p in (model.params, quantised))
    lies = lambda leaf: leaf.sharding  # noqa: E731
    assert jax.tree.map(lies, found) == jax.tree.map(lies, expected)


def test_twenty_steps_leave_the_base_bit_by_bit_and_trace_once(folder):
    model, method = load(folder, quantise=quant.nf4()), lora(rank=4)
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


def gradients(loss, adapter, batch):
    return jax.grad(lambda adapter: loss(adapter, batch)[0])(adapter)


def test_one_layer_at_most_is_dense(folder):
    model, method = load(folder, quantise=quant.nf4()), lora(rank=4)
    adapter = method.init(jax.random.key(0), model.params)
    batch = jax.tree.map(jnp.asarray, helpers.random_batch())
    program = jax.make_jaxpr(gradients)(loss_of(model, method), adapter, batch)
    shapes = helpers.shapes_in(program.jaxpr)
    stacks = [w.shape for w in matrices(model.params["layers"]).values()]
    for layers, fan_in, fan_out in stacks:
        assert {(layers, fan_in, fan_out), (layers, fan_out, fan_in)}.isdisjoint(shapes)
        assert (fan_out, fan_in) in shapes  # one layer's


def test_what_the_gradient_takes_is_codes_and_a_layer_or_two(optimised_here):
    layers = 16
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers}
    model = random_model(helpers.TINY | sizes, jax.random.key(0))
    method, batch = lora(rank=2), jax.tree.map(jnp.asarray, helpers.random_batch(rows=1, seq=8))
    adapter = method.init(jax.random.key(0), model.params)

    def memory(params):
        loss = loss_of(model.with_params(params), method)
        program = jax.jit(gradients).lower(loss, adapter, batch).compile()
        return program.memory_analysis()

    plain, kept = memory(model.params), memory(quant.quantise(model.params, quant.nf4()))
    dense = tree.num_bytes(matrices(model.params["layers"]))
    assert plain.argument_size_in_bytes - kept.argument_size_in_bytes > 0.85 * dense
    assert kept.temp_size_in_bytes - plain.temp_size_in_bytes < 2 * dense / layers


def test_a_merged_adapter_is_that_over_the_dequantised_base(folder, tmp_path):
    model, method = load(folder, quantise=quant.nf4()), lora(rank=4)
    adapter = helpers.trained(method, load(folder).params, std=0.05)
    merged = method.merge(model.params, adapter)
    assert all(isinstance(w, jax.Array) for w in matrices(merged).values())
    tokens = np.arange(12)[None]
    attached = model.with_params(method.attach(model.params, adapter))
    save_model(tmp_path / "merged", model, merged)
    np.testing.assert_allclose(
        load(tmp_path / "merged").logits(tokens), attached.logits(tokens), rtol=0, atol=5e-3
    )


def test_an_adapter_of_a_quantised_base_is_known_to_be_of_the_original(folder, tmp_path):
    model, method = load(folder, quantise=quant.nf4()), lora(rank=4)
    adapter = helpers.trained(method, load(folder).params, std=0.05)
    save_adapter(tmp_path / "adapter", model, method, adapter)
    _, found = load_adapter(tmp_path / "adapter", load(folder))
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    over = load(folder, quantise=quant.int8(), adapter=tmp_path / "adapter")
    assert isinstance(over.params["layers"]["mlp"]["up"]["kernel"], Lora)


@pytest.mark.parametrize("format_of", [quant.nf4, quant.stored], ids=["nf4", "stored"])
def test_params_in_a_format_are_not_quantised_again(folder, format_of):
    params = load(folder, quantise=quant.nf4()).params
    message = "layers/attention/key/kernel is a Nf4 already; only an array can be quantised"
    with pytest.raises(ValueError, match=message):
        quant.quantise(params, format_of())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_named(folder, bad):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = bad
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} holds a number that is not finite"):
        load(folder, quantise=quant.nf4())
    with pytest.raises(ValueError, match="layers/mlp/up/kernel holds a number that is not finite"):
        quant.quantise(load(folder).params, quant.nf4())


def test_integers_are_refused_by_name(folder):
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is stored as I8: codes of a quantised model"):
        load(folder, quantise=quant.nf4())
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
        load(folder, quantise=quant.nf4())


def test_quantised_params_are_not_saved_as_a_model(folder, tmp_path):
    model = load(folder, quantise=quant.nf4())
    with pytest.raises(ValueError, match="is a Nf4, not an array; merge the adapter first, or"):
        save_model(tmp_path / "out", model)
    save_model(tmp_path / "out", model, quant.dense(model.params))
    assert load(tmp_path / "out").fingerprint != model.fingerprint  # other weights


def test_a_folder_has_nothing_stored_in_blocks(folder):
    with pytest.raises(ValueError, match=r"is not in blocks: only a .gguf file's .* Q4_1 or Q8_0"):
        load(folder, quantise=quant.stored())


@pytest.mark.real
def test_the_blocks_of_a_gguf_file_stay_as_they_are(optimised_here):
    file = helpers.smollm2_gguf()
    kept, model = load(file, quantise=quant.stored()), load(file)
    assert tree.num_bytes(kept.params["layers"]) < 0.16 * tree.num_bytes(model.params["layers"])
    assert kept.fingerprint == model.fingerprint
    for name, w in matrices(kept.params["layers"]).items():
        dense = tree.flatten(model.params["layers"])[name]
        np.testing.assert_allclose(
            w.dense(), dense, rtol=0, atol=1e-7 * float(jnp.abs(dense).max())
        )
    tokens = np.arange(100, 132)[None]
    np.testing.assert_allclose(kept.logits(tokens), model.logits(tokens), rtol=0, atol=2e-3)


def test_a_reward_model_over_a_quantised_base(folder, tmp_path):
    model = load(folder, quantise=quant.nf4())
    method = lora(rank=4)
    params = tj.init_scorer(jax.random.key(0), model, method)
    tj.save_scorer(tmp_path / "reward", model, method, params)
    found, _, _ = tj.load_scorer(folder, quantise=quant.nf4(), adapter=tmp_path / "reward")
    assert isinstance(found.params["layers"]["mlp"]["up"]["kernel"], quant.Nf4)
    shutil.rmtree(tmp_path / "reward")
