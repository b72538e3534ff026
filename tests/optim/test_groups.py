import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import bigram, helpers
from trainjax import losses, optim, peft, train, tree, types
from trainjax.optim.groups import assign
from trainjax.policies import policy

PARAMS = {
    "embed": {"embedding": jnp.ones((4, 2))},
    "layers": {"attention": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}},
    "norm": {"scale": jnp.ones(2)},
}
GRADS = jax.tree.map(lambda p: jnp.full(p.shape, 2.0), PARAMS)


def moved(groups, *, steps=1, make=None, weight_decay=0.0, grads=GRADS):
    make = make or (lambda decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1)))
    tx = optim.grouped(make, groups, weight_decay)
    state, params, update = tx.init(PARAMS), PARAMS, jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(p) for name, p in tree.flatten(params).items()}, state


def test_the_first_rule_that_matches_wins():
    found, _ = moved(
        [
            optim.Group("bias", learning_rate=0.5),
            optim.Group("attention", learning_rate=2.0),
            optim.Group(".*"),
        ]
    )
    np.testing.assert_allclose(found["layers/attention/bias"], 0.9)
    np.testing.assert_allclose(found["layers/attention/kernel"], 0.6)
    np.testing.assert_allclose(found["norm/scale"], 0.8)


def test_layers_of_one_array_have_rates_of_their_own_and_frozen_ones_stay_bit_by_bit():
    found, _ = moved(
        [
            optim.Group("layers/0/|embed", learning_rate=0.0),
            optim.Group("layers/1/", learning_rate=0.5),
            optim.Group(".*"),
        ],
        steps=5,
        make=lambda decay: optax.adamw(0.1, weight_decay=0.3),
    )
    kernel = found["layers/attention/kernel"]
    assert (kernel[0] == 1.0).all()
    assert (found["embed/embedding"] == 1.0).all()
    assert (kernel[1] > kernel[2]).all()
    np.testing.assert_allclose(kernel[2], found["norm/scale"][0])


def test_what_is_frozen_has_no_state():
    _, state = moved(
        [optim.Group("embed|attention", learning_rate=0.0), optim.Group(".*")],
        make=lambda decay: optax.adam(0.1),
    )
    moments = [leaf for leaf in jax.tree.leaves(state) if jnp.ndim(leaf) > 0]
    assert [leaf.shape for leaf in moments] == [(2,), (2,)]


def test_decay_is_the_groups_or_the_optimizers():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    rules = [
        optim.Group("norm|bias", weight_decay=0.0),
        optim.Group("embed", weight_decay=0.5, learning_rate=0.5),
        optim.Group(".*"),
    ]
    found, _ = moved(rules, weight_decay=0.2, grads=zeros)
    np.testing.assert_allclose(found["norm/scale"], 1.0)
    np.testing.assert_allclose(found["layers/attention/bias"], 1.0)
    np.testing.assert_allclose(found["embed/embedding"], 1 - 0.5 * 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(found["layers/attention/kernel"], 1 - 0.1 * 0.2, rtol=1e-6)


def test_unfreezing_by_stage():
    rules = [
        optim.Group("norm"),
        optim.Group("layers/2/", from_step=2),
        optim.Group("layers/", from_step=4),
        optim.Group("embed", learning_rate=0.0),
    ]
    seen = []
    for steps in (2, 3, 4, 5):
        found, _ = moved(rules, steps=steps)
        kernel = found["layers/attention/kernel"]
        seen.append([bool((part != 1).all()) for part in (kernel[0], kernel[1], kernel[2])])
        assert (found["norm/scale"] != 1).all()
    assert seen == [
        [False, False, False],
        [False, False, True],
        [False, False, True],
        [True, True, True],
    ]


def test_lora_plus_is_a_group():
    model = helpers.tiny()
    batch = helpers.packed([np.arange(3, 15, dtype=np.int32)] * 2, [[0], [1]], 12)
    results = []
    for method, tx in [
        (peft.lora_plus(rank=2, ratio=8.0), None),
        (
            peft.lora(rank=2),
            optim.grouped(
                lambda decay: optax.adamw(1e-3, weight_decay=decay),
                [optim.Group("kernel/b$", learning_rate=8.0), optim.Group(".*")],
                0.1,
            ),
        ),
    ]:
        tx = tx or method.transform(5, optax.adamw(1e-3, weight_decay=0.1))
        adapter = method.init(jax.random.key(0), model.params)
        state, step = train.init(adapter, tx), train.make_step(tx)
        for _ in range(5):
            state, metrics = step(state, losses.sft(policy(model, method)), batch)
        results.append(float(metrics["loss"]))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_adapters_of_some_layers_are_named_by_the_models_layers():
    params = {"layers": {"kernel": jnp.ones((2, 3))}}
    rules = [optim.Group("layers/5/", learning_rate=3.0), optim.Group("layers/2/")]
    found = assign(params, rules, {"layers/kernel": [2, 5]})
    assert [group.learning_rate for group in found["layers/kernel"]] == [1.0, 3.0]


def test_it_hands_extra_arguments_on_and_compiles_once():
    params, traces = bigram.narrow_params(), []
    batch = helpers.packed([np.arange(3, 15, dtype=np.int32)] * 2, [[0], [1]], 12)

    def counted(policy, params, batch, key):
        traces.append(1)
        return losses.sft(policy)(params, batch, key)

    tx = optim.grouped(
        lambda decay: optim.sophia_h(1e-2, weight_decay=decay),
        [optim.Group("hidden", weight_decay=0.0), optim.Group(".*")],
        0.1,
    )
    state, step, values, counts = train.init(params, tx), train.make_step(tx), [], []
    for _ in range(6):
        state, metrics = step(state, types.Loss(counted, bigram.Narrow()), batch)
        values.append(float(metrics["loss"]))
        counts.append(len(traces))
    assert values[-1] < values[0]
    assert "clipped" in metrics
    assert set(counts) == {counts[0]}


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([optim.Group("norm")], "no group matches the parameter embed/embedding; end the groups"),
        ([optim.Group(".*"), optim.Group("nrom")], "the group 'nrom' has no parameter"),
        ([optim.Group(".*"), optim.Group("norm")], "the group 'norm' has no parameter"),
        ([optim.Group("(")], r"'\(' is not a regular expression"),
        ([], "there are no groups"),
        ([optim.Group(".*", learning_rate=-1.0)], "learning_rate=-1.0 of the group '.*' is 0 or"),
        ([optim.Group(".*", weight_decay=-0.1)], "weight_decay=-0.1 of the group"),
        (
            [optim.Group("layers/0/", weight_decay=0.5), optim.Group(".*")],
            "the layers of layers/attention/bias are one array",
        ),
    ],
)
def test_groups_that_make_no_sense_get_a_sentence(groups, sentence):
    with pytest.raises(ValueError, match=sentence):
        moved(groups)
