"""(IA)³: what its vectors scale, biases included, how it begins, and PEFT's files of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import families, helpers
from tests.peft import contract
from trainjax import losses, tree
from trainjax.models import load, load_adapter, save_adapter
from trainjax.peft.ia3 import Ia3, from_peft, ia3
from trainjax.policies import policy
from trainjax.train import init, make_step
from trainjax.types import PeftFiles

KEY = jax.random.key(0)
BIASED = {"attention_bias": True, "mlp_bias": True}


def test_by_default_it_scales_keys_values_and_the_inner_activations():
    """TINY has 2 layers, 2 kv heads of 8 and 48 inner activations."""
    params = helpers.tiny().params
    adapter = tree.flatten(ia3().init(KEY, params))
    assert {name: leaf.shape for name, leaf in adapter.items()} == {
        "layers/attention/key/kernel/outputs": (2, 16),
        "layers/attention/value/kernel/outputs": (2, 16),
        "layers/mlp/down/kernel/inputs": (2, 48),
    }
    assert all((leaf == 1).all() for leaf in adapter.values())


@pytest.mark.parametrize("merged", [False, True])
def test_outputs_are_scaled_with_their_bias_and_inputs_without(merged):
    rng = np.random.default_rng(0)
    w, bias, x = (rng.standard_normal(s).astype(np.float32) for s in ((8, 6), (6,), (3, 8)))
    outer, inner = (rng.standard_normal(n).astype(np.float32) for n in (6, 8))
    params = {n: {"kernel": jnp.asarray(w), "bias": jnp.asarray(bias)} for n in ("key", "down")}
    adapter = {
        "key": {"kernel": {"outputs": jnp.asarray(outer)}},
        "down": {"kernel": {"inputs": jnp.asarray(inner)}},
    }
    method = ia3("key|down", "down")
    found = (method.merge if merged else method.attach)(params, adapter)

    def layer(name):
        return jnp.asarray(x) @ found[name]["kernel"] + found[name]["bias"]

    np.testing.assert_allclose(layer("key"), (x @ w + bias) * outer, rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer("down"), (x * inner) @ w + bias, rtol=0, atol=1e-5)


def test_it_may_start_from_a_standard_normal_as_in_peft():
    params = {"key": {"kernel": jnp.zeros((4, 20_000))}}
    scale = ia3("key", init_ia3_weights=False).init(KEY, params)["key"]["kernel"]["outputs"]
    # 20000 draws: the mean's standard deviation is 0.007, the standard deviation's 0.005.
    np.testing.assert_allclose((scale.mean(), scale.std()), (0, 1), atol=0.03)


def test_a_scale_in_bfloat16_is_rounded_once():
    """Products of float32 numbers, cast then: not of a vector that was rounded first."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)), jnp.bfloat16)
    scale = jnp.linspace(0.9, 1.1, 8)
    found = x @ Ia3(jnp.eye(8, dtype=jnp.bfloat16), inputs=scale)
    expected = (np.asarray(x, np.float32) * np.asarray(scale)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "keey"}, "matches 'keey'; the names are .*layers/attention/key/kernel"),
        ({"feedforward": "up"}, "feedforward='up' matches no target; they are .*mlp/down/kernel"),
        ({"feedforward": "("}, r"'\(' is not a regular expression"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_would_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        ia3(**settings).init(KEY, helpers.tiny().params)


# --- files --------------------------------------------------------------------------------------

MODULES = {
    f"layers/{i}/{ours}/kernel": f"model.layers.{i}.{theirs}"
    for i in (0, 1)
    for ours, theirs in (
        ("attention/key", "self_attn.k_proj"),
        ("attention/output", "self_attn.o_proj"),
        ("mlp/down", "mlp.down_proj"),
    )
}


def exported(target: str = "key|down") -> PeftFiles:
    method, params = ia3(target), helpers.tiny().params
    return method.export(contract.moved(method.init(KEY, params)), MODULES)


def test_tensors_have_the_shapes_of_peft():
    files = exported()
    assert {name: tensor.shape for name, tensor in files.tensors.items()} == {
        "model.layers.0.self_attn.k_proj.ia3_l": (16, 1),
        "model.layers.1.self_attn.k_proj.ia3_l": (16, 1),
        "model.layers.0.mlp.down_proj.ia3_l": (1, 48),
        "model.layers.1.mlp.down_proj.ia3_l": (1, 48),
    }
    assert files.fields["target_modules"] == ["down_proj", "k_proj"]
    assert files.fields["feedforward_modules"] == ["down_proj"]


def test_a_square_matrix_is_read_as_it_was_written():
    files, params = exported("output"), helpers.tiny().params
    _, adapter = from_peft(files, MODULES, params)
    (name,) = tree.flatten(adapter)
    assert name == "layers/attention/output/kernel/outputs"


def test_a_layer_that_was_left_out_is_scaled_by_one():
    files = exported("key")
    del files.tensors["model.layers.0.self_attn.k_proj.ia3_l"]
    _, adapter = from_peft(files, MODULES, helpers.tiny().params)
    scale = adapter["layers"]["attention"]["key"]["kernel"]["outputs"]
    assert (scale[0] == 1).all()
    assert (scale[1] != 1).all()


K = "model.layers.0.self_attn.k_proj.ia3_l"


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"fan_in_fan_out": True}, {}, "fan_in_fan_out=True, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save=\['lm_head'\]"),
        ({}, {K: np.ones((17, 1))}, r"k_proj: ia3_l \(17, 1\) does not fit .*\(16, 1\) would"),
        ({}, {K: np.full((16, 1), np.nan)}, "k_proj: ia3_l holds NaN"),
        ({}, {K: np.ones((1, 32))}, "inputs of layers/attention/key/kernel in some layers"),
        ({}, {"visual.ia3_l": np.ones((1, 3))}, "holds 'visual.ia3_l', which fits no module"),
    ],
    ids=["transposed", "more modules", "shape", "nan", "both sides", "unknown"],
)
def test_files_that_do_not_fit_are_named(fields, tensors, message):
    files = exported()
    with pytest.raises(ValueError, match=message):
        from_peft(
            PeftFiles(files.fields | fields, files.tensors | tensors),
            MODULES,
            helpers.tiny().params,
        )


# --- PEFT's own ---------------------------------------------------------------------------------


def torch_logits(model, tokens) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def peft_model(path, tmp_path, **settings):
    """PEFT's wrapper of a saved model of transformers, its vectors drawn at random, and saved."""
    import peft
    import transformers

    families.torch_model(path).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM", **settings))
    families.torch_randomised(model.eval(), only="ia3_")
    model.save_pretrained(tmp_path / "theirs")
    return model


SETTINGS = {
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}
SQUARE = {"target_modules": ["q_proj", "o_proj", "up_proj"], "feedforward_modules": ["o_proj"]}
MODELS = pytest.mark.parametrize(
    ("family", "settings"),
    [("llama_grouped", {}), ("llama_biased_llama3", SETTINGS), ("qwen2", SQUARE)],
    ids=["defaults", "biases", "square"],
)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@MODELS
def test_an_adapter_of_peft_is_the_same_function_here_and_again_there(tmp_path, family, settings):
    import peft
    import transformers

    theirs = peft_model(family, tmp_path, **settings)
    tokens = np.random.default_rng(1).integers(0, 48, (3, 17)).astype(np.int32)
    base, expected = load(tmp_path / "base"), torch_logits(theirs, tokens)
    method, adapter = load_adapter(tmp_path / "theirs", base)
    for params in (method.attach(base.params, adapter), method.merge(base.params, adapter)):
        found = base.with_params(params).logits(tokens)
        helpers.assert_close({"logits": found}, {"logits": expected}, 1e-5)
    save_adapter(tmp_path / "ours", base, method, adapter)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = torch_logits(peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval(), tokens)
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_twenty_steps_have_the_losses_of_peft(tmp_path):
    import torch

    theirs = peft_model("llama_biased_llama3", tmp_path, **SETTINGS)
    base = load(tmp_path / "base")
    method, adapter = load_adapter(tmp_path / "theirs", base)
    tx = optax.adamw(1e-2, weight_decay=0.0)
    state, step, loss = init(adapter, tx), make_step(tx), losses.sft(policy(base, method))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    rng = np.random.default_rng(0)
    weights = np.full((2, 14), 1 / 26, np.float32)
    weights[:, 0] = 0.0
    for _ in range(20):
        tokens = rng.integers(3, 48, (2, 14)).astype(np.int32)
        ids = torch.from_numpy(tokens).long()
        value = theirs(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        state, metrics = step(state, loss, {"tokens": tokens, "weights": weights})
        assert abs(float(metrics["loss"]) - value.item()) < 1e-4


class TestContract(contract.Contract):
    methods = {"defaults": ia3(), "biases": ia3("attention|mlp", "output|down")}
    settings = BIASED
