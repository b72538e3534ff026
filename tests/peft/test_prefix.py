"""Prefix tuning: where its keys and values stand, packing, windows, shared prompts, the cache, files."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainjax as tj
from tests import helpers
from tests.peft import contract
from trainjax import losses, parallel, tree
from trainjax.peft.prefix import prefix
from trainjax.peft.prompt import prompt
from trainjax.policies import policy

KEY = jax.random.key(0)
TOKENS = contract.TOKENS


def adapter_of(model, method):
    return contract.moved(method.init(KEY, model.params), std=0.5)


def by_hand(model, keys, values, tokens, window=None) -> np.ndarray:
    """Logits of one text in float64, by the definition: `[prefix; own]` in every layer's attention.

    `keys` and `values` are `[layers, virtual, kv_heads * dim]`; own tokens begin at position `virtual`.
    """
    c, named = (
        model.config,
        {k: np.asarray(v, np.float64) for k, v in tree.flatten(model.params).items()},
    )
    count, group = keys.shape[1], c.num_heads // c.num_kv_heads

    def normed(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * scale

    at = count + np.arange(len(tokens))
    angle = at[:, None, None] * c.rope.frequencies(c.head_dim)

    def turned(x):
        a, b = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def heads(x):
        return x.reshape(len(x), -1, c.head_dim)

    x = named["embed/embedding"][tokens]
    for layer in range(c.num_layers):
        w = {k.removeprefix("layers/"): v[layer] for k, v in named.items() if "layers/" in k}
        y = normed(x, w["attention_norm/scale"])
        q, k, v = (heads(y @ w[f"attention/{n}/kernel"]) for n in ("query", "key", "value"))
        k = np.concatenate([heads(keys[layer]), turned(k)])
        v = np.concatenate([heads(values[layer]), v])
        scores = np.einsum("qhd,khd->hqk", turned(q), np.repeat(k, group, 1)) / np.sqrt(c.head_dim)
        age = at[:, None] - np.arange(len(k))[None]
        seen = (age >= 0) & (age < (window or np.inf))
        p = np.exp(np.where(seen, scores, -np.inf))
        p /= p.sum(-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", p, np.repeat(v, group, 1)).reshape(len(x), -1)
        x = x + out @ w["attention/output/kernel"]
        y = normed(x, w["mlp_norm/scale"])
        gate = y @ w["mlp/gate/kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp/up/kernel"])) @ w["mlp/down/kernel"]
    return normed(x, named["norm/scale"]) @ named["head/kernel"]


@pytest.mark.parametrize("window", [None, 4])
def test_keys_and_values_stand_before_each_text_and_a_window_counts_them(window):
    model, method = contract.configured(helpers.tiny(), window=window), prefix(3)
    adapter = adapter_of(model, method)
    found = model.with_params(method.attach(model.params, adapter)).logits(TOKENS)
    parts = (np.asarray(adapter["prefix"][name], np.float64) for name in ("key", "value"))
    keys, values = parts
    expected = np.stack([by_hand(model, keys, values, row, window) for row in TOKENS])
    helpers.assert_close({"logits": found}, {"logits": expected}, 1e-5)
    assert np.abs(expected - model.logits(TOKENS)).max() > 0.1


METHODS = pytest.mark.parametrize("method", [prefix(3), prompt(3)], ids=["prefix", "prompt"])


@METHODS
@pytest.mark.parametrize("window", [None, 4])
def test_packed_examples_each_see_it_as_they_do_alone(method, window):
    """Loss and gradients of packed rows are those of a row each; the gradient is the sum over all."""
    model = contract.configured(helpers.tiny(), window=window)
    adapter = adapter_of(model, method)
    lengths = (12, 5, 6, 9, 4, 11)
    examples = [np.arange(3, 3 + n, dtype=np.int32) * 7 % 61 for n in lengths]
    loss = losses.sft(policy(model, method))
    packed = helpers.packed(examples, [[0], [1, 2], [3, 4], [5], [], []], 14)  # of one shape
    alone = helpers.packed(examples, [[i] for i in range(6)], 14)
    value, grads = helpers.loss_and_gradients(loss, adapter, packed)
    expected, others = helpers.loss_and_gradients(loss, adapter, alone)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    helpers.assert_close(grads, others, 1e-5)


@METHODS
def test_completions_that_share_their_prompt_see_it_as_they_do_apart(method):
    model = helpers.tiny()
    adapter = adapter_of(model, method)
    hidden = jax.jit(policy(model, method).hidden)
    tokens = (np.arange(13, dtype=np.int32) * 11 % 61)[None]
    shared = {
        "tokens": tokens,
        "segments": np.asarray([[1] * 5 + [2] * 4 + [3] * 4], np.int32),
        "prefixes": np.asarray([[0] * 5 + [1] * 8], np.int32),
        "positions": np.asarray([[*range(5), *range(5, 9), *range(5, 9)]], np.int32),
    }
    found = hidden(adapter, shared)[0]
    for own in (slice(5, 9), slice(9, 13)):
        row = np.concatenate([tokens[:, :5], tokens[:, own]], axis=1)
        alone = hidden(adapter, {"tokens": row})[0]
        np.testing.assert_allclose(found[own], alone[5:], rtol=0, atol=2e-5)


@METHODS
def test_its_gradient_is_a_sum_in_float32_where_all_else_is_in_bf16(method):
    """2000 rows of one token each push the same way: a sum in bf16 would stop at 256 times one."""
    model = contract.changed(helpers.tiny(), dtype=jnp.dtype("bfloat16"))
    model = model.with_params(contract.narrow(model.params))
    adapter = adapter_of(model, method)
    loss = losses.sft(policy(model, method))

    def gradient(rows):
        weights = np.zeros((2000, 4), np.float32)
        weights[:rows, 1:] = 1.0  # not normalised: the gradient grows with the rows
        batch = {"tokens": np.tile(TOKENS[:1, :4], (2000, 1)), "weights": weights}
        return helpers.loss_and_gradients(loss, adapter, batch)[1]

    one, many = gradient(1), gradient(2000)
    for name, value in one.items():
        cosine = np.sum(many[name] * value) / np.linalg.norm(value) / np.linalg.norm(many[name])
        ratio = np.linalg.norm(many[name]) / np.linalg.norm(value)
        assert cosine > 0.999, name
        np.testing.assert_allclose(ratio, 2000, rtol=0.05, err_msg=name)


def test_a_prompt_goes_through_the_layers_once_whatever_the_batch():
    """Nothing in the program has a row of prompt and text together, nor a prompt a row."""
    model, method = helpers.tiny(), prompt(5)
    adapter = method.init(KEY, model.params)
    run = lambda adapter, tokens: policy(model, method).hidden(adapter, {"tokens": tokens})  # noqa: E731
    program = jax.make_jaxpr(run)(adapter, jnp.zeros((3, 7), jnp.int32)).jaxpr
    shapes = helpers.shapes_in(program)
    assert {(1, 5, 32), (3, 7, 32)} <= shapes
    assert not {(3, 12, 32), (3, 5, 32)} & shapes


@METHODS
def test_attaching_leaves_no_trace_in_the_program_of_the_base(method):
    """Params without virtual tokens run one program, before and after others were attached."""
    model = helpers.tiny()
    module, tokens = model.module, jnp.zeros((3, 7), jnp.int32)
    run = lambda params: module.apply({"params": params}, tokens, tokens)[0]  # noqa: E731
    before = jax.make_jaxpr(run)(model.params)
    attached = method.attach(model.params, method.init(KEY, model.params))
    virtual = jax.make_jaxpr(run)(attached)
    assert len(helpers.shapes_in(virtual.jaxpr)) > len(helpers.shapes_in(before.jaxpr))
    assert str(jax.make_jaxpr(run)(model.params)) == str(before)
    assert not any(3 in shape[-3:-1] for shape in helpers.shapes_in(before.jaxpr) if len(shape) > 3)


def test_over_a_mesh_keys_and_values_are_split_as_the_projections_are():
    mesh = helpers.mesh_of(1, 2, 2)
    params = parallel.place(helpers.tiny().params, mesh)
    adapter = prefix(3, prefix_projection=True).init(KEY, params)["prefix"]
    assert adapter["key"]["kernel"].sharding.spec[-1] == "tensor"
    assert prefix(3).init(KEY, params)["prefix"]["value"].sharding.spec[-1] == "tensor"
    assert adapter["hidden"]["kernel"].sharding.is_fully_replicated


def test_a_projection_makes_a_key_and_a_value_a_layer_of_each_virtual_token():
    """`W2 tanh(W1 e + b1) + b2` in float64."""
    model, method = helpers.tiny(), prefix(3, prefix_projection=True, encoder_hidden_size=5)
    adapter = adapter_of(model, method)
    parts = {k: np.asarray(v, np.float64) for k, v in tree.flatten(adapter["prefix"]).items()}
    hidden = np.tanh(parts["embedding"] @ parts["hidden/kernel"] + parts["hidden/bias"])
    found = method.attach(model.params, adapter)["prefix"]
    for name in ("key", "value"):
        for layer in range(2):
            made = hidden @ parts[f"{name}/kernel"][layer] + parts[f"{name}/bias"][layer]
            np.testing.assert_allclose(found[name][layer], made, rtol=0, atol=1e-5)


def test_what_a_projection_made_is_what_is_saved_and_comes_back_as_a_plain_prefix(tmp_path):
    model, method = helpers.tiny(), prefix(3, prefix_projection=True)
    adapter = adapter_of(model, method)
    tj.save_adapter(tmp_path, model, method, adapter)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["prefix_projection"]) == ("PREFIX_TUNING", False)
    plain, tokens = tj.load_adapter(tmp_path, model)
    assert plain is prefix(3)
    made = method.attach(model.params, adapter)["prefix"]
    contract.equal(tokens["prefix"], dict(made))


def test_attached_params_are_not_saved_as_a_model(tmp_path):
    model, method = helpers.tiny(), prefix(3)
    params = method.attach(model.params, method.init(KEY, model.params))
    with pytest.raises(ValueError, match="prefix/key has no place in the checkpoint of a llama"):
        tj.save_model(tmp_path / "out", model, params)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0: there is at least one"),
        ({"encoder_hidden_size": 8}, "encoder_hidden_size=8 is the width of a projection"),
        ({"encoder_hidden_size": 0, "prefix_projection": True}, "encoder_hidden_size=0"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_what_would_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        prefix(**settings)


@METHODS
def test_params_take_virtual_tokens_once(method):
    model = helpers.tiny()
    params = prefix(2).attach(model.params, prefix(2).init(KEY, model.params))
    with pytest.raises(ValueError, match="virtual tokens already, a prefix"):
        method.attach(params, method.init(KEY, model.params))


def test_a_model_without_the_matrices_is_refused():
    with pytest.raises(
        ValueError, match="need 'layers/attention/key/kernel'; the model has kernel"
    ):
        prefix(2).init(KEY, {"kernel": jnp.zeros((2, 2))})


class TestContract(contract.Contract):
    methods = {
        "plain": prefix(3),
        "projected": prefix(3, prefix_projection=True, encoder_hidden_size=6),
    }
    begins_as_base = False
    merges = False
