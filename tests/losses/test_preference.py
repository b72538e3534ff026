"""Pair losses: values and gradients of TRL's code, identities of the papers, and how they are wired."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainjax as tj
from tests import bigram, helpers, toy
from tests.preferences import BATCHES, PAIRS, SEQ, RandomPairs, random_pairs
from trainjax.losses import kto, preference
from trainjax.losses.pairs import AlphaDivergence, Pairs, diverged, forward_kl, js_divergence
from trainjax.losses.preference import pairwise
from trainjax.ops.vocab import NO_EXTRAS, TokenStats
from trainjax.types import pytree

GOLDEN = json.loads((helpers.GOLDEN / "preference.json").read_text())["values"]
LABELS = np.array([1.0, 0.0, 0.0, 1.0])  # as in tests/golden/make_preference.py
ALL = [
    *("sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm", "aot", "aot_unpaired"),
    *("simpo", "orpo", "cpo", "rrhf"),
]
WITHOUT_REFERENCE = {"simpo", "orpo", "cpo", "rrhf"}


class Given:
    """A policy or a reference whose log-probabilities are given; each row is a pair."""

    def __call__(self, params, batch, key=None, *, where=None, extras=NO_EXTRAS):
        return stats(params["logprobs"], params.get("collision") if extras.collision else None)


def stats(logprobs: Any, collision: Any = None) -> TokenStats:
    zeros = jnp.zeros_like(logprobs)
    made = TokenStats(logprobs, zeros, zeros)
    return made if collision is None else made._replace(collision=collision)


class GivenReference:
    def __call__(self, batch, where=None):
        return stats(batch["reference"])


POLICY, REFERENCE = Given(), GivenReference()
jax.tree_util.register_static(Given)
jax.tree_util.register_static(GivenReference)


def beside(x: np.ndarray) -> np.ndarray:
    """`[2 * pairs, seq]`, chosen first -> `[pairs, 2 * seq]`, each pair in a row."""
    return np.concatenate(np.split(np.asarray(x), 2), axis=1)


def batch_of(random: RandomPairs) -> dict[str, np.ndarray]:
    mask = beside(random.mask)
    place = np.repeat([1, 2], SEQ)[None]
    return {
        "completions": np.where(mask, place, 0).astype(np.int32),
        "groups": np.full((PAIRS, 1), 1 / PAIRS),
        "reference": beside(random.reference),
        "labels": LABELS[:, None],
    }


@jax.jit
@functools.partial(jax.value_and_grad, argnums=1)
def run(loss, params, batch):
    return loss(params, batch)[0]


@jax.jit
def call(loss, params, batch, key=None):
    return loss(params, batch, key)


run_all = jax.jit(jax.vmap(run))


@functools.cache
def batches_of(name: str) -> Any:
    """All batches, stacked: the loss with its coefficients, the params and the batch of each."""
    given = [
        (
            loss_of(name, one),
            {"logprobs": beside(one.policy), "collision": beside(one.collision)},
            batch_of(one),
        )
        for one in map(random_pairs, range(BATCHES))
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *given)


def values_and_gradients(name: str, kind: Any) -> np.ndarray:
    """Of all batches, as the golden has it: the loss, then its gradient summed over each completion."""
    stacked = batches_of(name)
    if kind == np.float64:
        values, gradients = helpers.in_float64(run_all, *stacked)
    else:
        values, gradients = run_all(*narrow(stacked))
    by_completion = np.asarray(gradients["logprobs"]).reshape(BATCHES, PAIRS, 2, SEQ).sum(3)
    by_completion = by_completion.swapaxes(1, 2).reshape(BATCHES, -1)
    return np.concatenate([np.asarray(values)[:, None], by_completion], axis=1)


def narrow(tree: Any) -> Any:
    """Floats as float32."""
    return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, tree)


def coefficients(name: str, random: RandomPairs) -> dict[str, Any]:
    """As arrays, which are not looked at when the loss is made: it is made 200 times."""
    found = {"beta": random.beta}
    if name in ("robust", "exo_pair", "aot", "aot_unpaired", "cpo"):
        found["label_smoothing"] = random.label_smoothing
    if name == "discopop":
        found["tau"] = random.tau
    if name == "simpo":
        found["gamma"] = 0.7
    return {name: np.float32(value) for name, value in found.items()}


def loss_of(name: str, random: RandomPairs) -> tj.types.Loss:
    divergences = {
        "forward_kl": forward_kl,
        "js_divergence": js_divergence,
        "alpha_divergence": AlphaDivergence(random.alpha),
    }
    if name in divergences:
        return pairwise(
            POLICY,
            REFERENCE,
            divergence=divergences[name],
            beta=np.float32(random.beta),
            label_smoothing=0.0,
        )
    if name == "ld_dpo":
        return pairwise(POLICY, REFERENCE, beta=np.float32(random.beta), ld_alpha=random.ld_alpha)
    if name == "wpo":
        return pairwise(POLICY, REFERENCE, beta=np.float32(random.beta), wpo=True)
    if name == "kto":
        return kto(POLICY, REFERENCE, random.beta, 1.3, 0.8)
    reference = None if name in WITHOUT_REFERENCE else REFERENCE
    return pairwise(POLICY, reference, getattr(preference, name), **coefficients(name, random))


@pytest.mark.parametrize("name", GOLDEN)
def test_values_and_gradients_are_those_of_trl_in_either_precision(name):
    """On 200 batches. Coefficients are float32, in TRL float64: hence relative, and not 1e-12."""
    for kind, tolerance in [(np.float64, 1e-6), (np.float32, 1e-5)]:
        if name in ("alpha_divergence", "orpo"):
            tolerance = 1e-5  # TRL computes these in float32
        for found, expected in zip(values_and_gradients(name, kind), GOLDEN[name], strict=True):
            scale = max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(
                found[: len(expected)] / scale,
                np.asarray(expected) / scale,
                0,
                tolerance,
                err_msg=np.dtype(kind).name,
            )


# --- identities ---------------------------------------------------------------------------------


def some_pairs(seed: int = 0, count: int = 5, **changes: Any) -> Pairs:
    rng = np.random.default_rng(seed)
    chosen, rejected = -rng.exponential(20, (2, count))
    refs = np.minimum(np.stack([chosen, rejected]) + rng.normal(0, 3, (2, count)), -0.1)
    lengths = rng.integers(1, 30, (2, count)).astype(float)
    fields = (chosen, rejected, *refs, *lengths, np.full(count, 1 / count))
    made = Pairs(*(jnp.asarray(x, jnp.float32) for x in fields))
    return made._replace(**{k: jnp.asarray(v, jnp.float32) for k, v in changes.items()})


def swapped(p: Pairs) -> Pairs:
    return Pairs(
        *(p.rejected, p.chosen, p.ref_rejected, p.ref_chosen),
        *(p.rejected_length, p.chosen_length, p.weights),
    )


def test_torchtunes_published_values_of_dpo():
    """c, r and the reference's of torchtune 0.6.1's test: -log sigmoid([0, 1, 2])."""
    chosen, rejected = [-0.5, -10.0, -1.0], [-0.1, -30.0, -21.0]
    refs = [-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1]
    pairs = some_pairs(count=3)._replace(
        chosen=jnp.array(chosen),
        rejected=jnp.array(rejected),
        ref_chosen=jnp.array(refs[0]),
        ref_rejected=jnp.array(refs[1]),
    )
    expected = np.log1p(np.exp(-np.array([0.0, 1.0, 2.0])))
    np.testing.assert_allclose(preference.sigmoid(pairs, beta=0.1), expected, rtol=1e-6)


def test_dpo_of_the_reference_itself_is_log_two():
    same = some_pairs()
    same = same._replace(ref_chosen=same.chosen, ref_rejected=same.rejected)
    np.testing.assert_array_equal(preference.sigmoid(same), np.full(5, np.log(2), np.float32))


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "robust", "sigmoid_norm"])
def test_a_swapped_pair_pulls_the_other_way(name):
    pairs = some_pairs()
    slope = jax.jit(jax.grad(lambda p: getattr(preference, name)(p).sum()))
    ours, theirs = slope(pairs), slope(swapped(pairs))
    assert np.all(ours.chosen <= 0)
    assert np.all(theirs.rejected >= 0)  # the same completion, now called the worse one
    assert np.all(ours.chosen < theirs.rejected)


def test_on_completions_of_equal_length_sigmoid_norm_is_sigmoid_of_beta_over_it():
    pairs = some_pairs(chosen_length=np.full(5, 8.0), rejected_length=np.full(5, 8.0))
    np.testing.assert_allclose(
        preference.sigmoid_norm(pairs, beta=2.0), preference.sigmoid(pairs, beta=0.25), rtol=1e-6
    )


def test_robust_without_wrong_labels_is_sigmoid():
    np.testing.assert_allclose(
        preference.robust(some_pairs(), label_smoothing=0.0), preference.sigmoid(some_pairs())
    )


def test_robust_is_unbiased_when_labels_are_flipped():
    """With a share eps of pairs swapped, its mean is DPO's on the true labels."""
    pairs, eps = some_pairs(), 0.2
    noisy = (1 - eps) * preference.robust(pairs, 0.1, eps)
    noisy += eps * preference.robust(swapped(pairs), 0.1, eps)
    np.testing.assert_allclose(noisy, preference.sigmoid(pairs, 0.1), rtol=1e-5)


def test_smoothed_labels_are_the_mean_over_flipped_ones():
    pairs, eps = some_pairs(), 0.2
    mean = (1 - eps) * preference.sigmoid(pairs) + eps * preference.sigmoid(swapped(pairs))
    np.testing.assert_allclose(preference.sigmoid(pairs, 0.1, eps), mean, rtol=1e-6)


def test_dno_with_certain_labels_is_sigmoid():
    pairs = some_pairs()
    found = preference.dno(pairs._replace(margins=jnp.full(5, 100.0)))
    np.testing.assert_allclose(found, preference.sigmoid(pairs), rtol=1e-6)


def test_dno_of_equal_scores_is_least_at_equal_log_ratios():
    pairs = some_pairs()
    slope = jax.grad(lambda p: preference.dno(p._replace(margins=jnp.zeros(5))).sum())(pairs)
    np.testing.assert_array_equal(np.sign(slope.chosen), np.sign(pairs.delta))


def test_rrhf_is_the_ranking_of_the_means_and_the_likelihood_of_the_better():
    pairs = some_pairs()
    w, lost = pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length
    expected = np.maximum(0, lost - w) - w
    np.testing.assert_allclose(preference.rrhf(pairs), expected, rtol=1e-6)


# --- by name -------------------------------------------------------------------------------------


def test_every_loss_that_needs_only_pairs_has_its_name():
    names = (
        "sigmoid robust hinge ipo exo_pair nca_pair bco_pair sppo_hard apo_zero apo_down discopop "
    )
    names += "sigmoid_norm aot aot_unpaired dno simpo orpo cpo rrhf"
    assert list(preference.LOSSES) == names.split()
    assert all(preference.LOSSES[name] is getattr(preference, name) for name in preference.LOSSES)


@functools.cache
def slopes() -> dict[str, Pairs]:
    """The gradient of every loss, all in one program."""
    pairs = Pairs(*(np.full(2, -1.5 - i, np.float32) for i in range(len(Pairs._fields))))
    pairs = pairs._replace(weights=np.full(2, 0.5, np.float32))

    @jax.jit
    def of_all(pairs):
        found = {}
        for name, loss in preference.LOSSES.items():
            found[name] = jax.grad(lambda pairs, loss=loss: loss(pairs).sum())(pairs)
        return found

    return jax.device_get(of_all(pairs))


@pytest.mark.parametrize("name", preference.LOSSES)
def test_a_loss_goes_with_a_reference_if_and_only_if_it_reads_one(name):
    slope = slopes()[name]
    reads = bool(slope.ref_chosen.any() | slope.ref_rejected.any())
    assert reads == (preference.LOSSES[name] not in preference.WITHOUT_REFERENCE)


# --- numerics -----------------------------------------------------------------------------------

EXTREMES = [-1e4, -300.0, -90.0, -1.0, 0.0, 1.0, 90.0, 300.0, 1e4]


DIVERGENCES = {
    "none": None,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": AlphaDivergence(0.5),
}


@functools.cache
def extremes() -> dict[str, tuple[np.ndarray, Pairs]]:
    """Values and slopes of every loss, `[divergences, pairs]`, all in one program."""
    c, r = (x.ravel() for x in np.meshgrid(EXTREMES, EXTREMES))
    count = len(c)
    ref = np.full(count, -1e4)
    pairs = some_pairs(
        count=count,
        ref_chosen=ref,
        ref_rejected=ref,
        chosen=np.minimum(ref + c, 0),
        rejected=np.minimum(ref + r, 0),
    )

    @jax.jit
    def of_all(pairs):
        each = [pairs if d is None else diverged(pairs, d) for d in DIVERGENCES.values()]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
        found = {}
        for name in ALL:
            value = lambda p, name=name: getattr(preference, name)(p).sum()  # noqa: E731
            found[name] = jax.vmap(jax.value_and_grad(value))(stacked)
        return found

    return jax.device_get(of_all(pairs))


@pytest.mark.parametrize("name", ALL)
def test_losses_and_gradients_are_finite_at_any_log_ratio(name):
    values, slopes = extremes()[name]
    for number, divergence in enumerate(DIVERGENCES):
        assert np.isfinite(values[number]), divergence
        for slope in jax.tree.leaves(slopes):
            assert np.isfinite(slope[number]).all(), divergence


@functools.cache
def with_and_without_an_empty_slot() -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and gradients of every loss of rows with one slot and of the same with two."""
    batch, full = batch_of(random_pairs(0)), random_pairs(0)
    wide = batch | {"groups": np.pad(batch["groups"], ((0, 0), (0, 1)))}
    losses = {
        name: pairwise(
            POLICY, None if name in WITHOUT_REFERENCE else REFERENCE, getattr(preference, name)
        )
        for name in ALL
    }

    @jax.jit
    def of_all(losses, params, *batches):
        return tuple(
            {name: run(loss, params, batch) for name, loss in losses.items()} for batch in batches
        )

    params = {"logprobs": beside(full.policy)}
    return jax.device_get(of_all(losses, *narrow((params, batch, wide))))


@pytest.mark.parametrize("name", ALL)
def test_pairs_of_weight_zero_may_hold_anything(name):
    """Two rows of two slots; the second slot is empty, as in a row that packs fewer pairs."""
    one, other = (found[name] for found in with_and_without_an_empty_slot())
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    np.testing.assert_allclose(one[1]["logprobs"], other[1]["logprobs"], rtol=1e-5, atol=1e-9)
    assert np.isfinite(other[1]["logprobs"]).all()


OF_PAIRS = [name for name in ALL if not name.startswith("aot")]  # which sort the batch


@functools.cache
def vmapped_and_jitted() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    @jax.jit
    def of_all(pairs):
        fns = {name: getattr(preference, name) for name in OF_PAIRS}
        return {name: (jax.vmap(fn)(pairs), fn(pairs)) for name, fn in fns.items()}

    return jax.device_get(of_all(some_pairs()))


@pytest.mark.parametrize("name", OF_PAIRS)
def test_vmap_over_pairs_and_jit_change_nothing(name):
    expected = getattr(preference, name)(some_pairs())
    for found in vmapped_and_jitted()[name]:
        np.testing.assert_allclose(found, expected, rtol=1e-6)


# --- wiring -------------------------------------------------------------------------------------


def test_metrics_are_trls():
    random = random_pairs(3)
    loss = pairwise(POLICY, REFERENCE, beta=0.5)
    batch = batch_of(random)
    _, metrics = call(loss, *narrow(({"logprobs": beside(random.policy)}, batch)))
    (chosen, rejected), (c, r) = (
        np.split(x.sum(1), 2) for x in (random.policy, random.policy - random.reference)
    )
    expected = {
        "rewards/chosen": 0.5 * c.mean(),
        "rewards/rejected": 0.5 * r.mean(),
        "rewards/accuracies": (c > r).mean(),
        "rewards/margins": 0.5 * (c - r).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def test_another_coefficient_is_no_other_program():
    loss = jax.tree.structure(pairwise(POLICY, REFERENCE, preference.ipo, beta=0.1))
    assert loss == jax.tree.structure(pairwise(POLICY, REFERENCE, preference.ipo, beta=0.7))
    assert loss != jax.tree.structure(pairwise(POLICY, REFERENCE, preference.hinge, beta=0.1))


BAD = {
    "beta=0.0: it is above 0": lambda: pairwise(POLICY, REFERENCE, preference.hinge, beta=0),
    "beta=-0.1: it is above 0": lambda: tj.losses.dpo(POLICY, REFERENCE, beta=-0.1),
    "label_smoothing=0.5: a share of wrong labels, from 0 to below 0.5": lambda: pairwise(
        POLICY, REFERENCE, preference.robust, label_smoothing=0.5
    ),
    "label_smoothing=0.0: a share of wrong labels, above 0 to below 0.5": lambda: pairwise(
        POLICY, REFERENCE, preference.exo_pair, label_smoothing=0
    ),
    "hinge has no coefficient 'bata'; did you mean 'beta'\\?; it has beta": lambda: pairwise(
        POLICY, REFERENCE, preference.hinge, bata=0.1
    ),
    "ld_alpha=2.0 is a weight from 0 to 1": lambda: pairwise(POLICY, REFERENCE, ld_alpha=2.0),
    "^beta=0.0: it is above 0$": lambda: kto(POLICY, REFERENCE, beta=0.0),
    "undesirable_weight=-1.0: weights are": lambda: kto(POLICY, REFERENCE, undesirable_weight=-1.0),
}


@pytest.mark.parametrize(("message", "make"), BAD.items(), ids=range(len(BAD)))
def test_coefficients_that_cannot_be_are_one_clear_sentence(message, make):
    with pytest.raises(ValueError, match=message):
        make()


# --- with a model -------------------------------------------------------------------------------

ROWS = [
    {"prompt": f"say {i}", "chosen": "ab" * (1 + i % 3), "rejected": f"no {i}"} for i in range(8)
]


SLOTS = 8
"""Of every row, whatever the packing, so that all batches go through one program."""


@functools.cache
def model_and_adapter():
    model = tj.models.random_model(toy.CONFIG, jax.random.key(0), tokenizer=toy.tokenizer())
    model = model.with_params(helpers.randomised(model.params, 0.12))
    method = tj.peft.lora(rank=2)
    return model, method, helpers.trained(method, model.params)


def model_batch(pack=tj.data.unpacked, share: bool = True):
    examples = tj.data.encode_groups(ROWS, toy.tokenizer(), 64, share_prompt=share)
    plan = tj.data.Plan(8, 192, pack, seed=None, buckets=1)
    batch = tj.data.fill(examples, plan, plan.epoch(examples, 0)[0])
    empty = SLOTS - batch["groups"].shape[1]
    return batch | {"groups": np.pad(batch["groups"], ((0, 0), (0, empty)))}


def combined(beta: float = 0.05, share: float = 0.1) -> tj.types.Loss:
    """DPO, and supervised fine-tuning with its coefficient: inputs of one program."""
    model, method, _ = model_and_adapter()
    policy = tj.policy(model, method)
    return tj.losses.dpo(policy, tj.reference(model), beta=beta) + share * tj.losses.sft(policy)


@functools.cache
def plain():
    """Loss and gradients with every completion beside its own prompt, one pair a row."""
    _, _, adapter = model_and_adapter()
    return helpers.loss_and_gradients(combined(), adapter, model_batch(share=False))


@pytest.mark.parametrize(
    ("share", "pack", "accumulate"),
    [
        (False, tj.data.best_fit, 1),
        (True, tj.data.unpacked, 2),
        (True, tj.data.best_fit, 2),
        pytest.param(True, tj.data.unpacked, 1, marks=pytest.mark.slow),
        pytest.param(True, tj.data.best_fit, 1, marks=pytest.mark.slow),
        pytest.param(False, tj.data.unpacked, 2, marks=pytest.mark.slow),
        pytest.param(False, tj.data.best_fit, 2, marks=pytest.mark.slow),
    ],
)
def test_sharing_prompts_packing_and_accumulation_change_nothing(share, pack, accumulate):
    _, _, adapter = model_and_adapter()
    batch = model_batch(pack, share)
    used = (batch["segments"] > 0).any(axis=1).sum()
    assert (used == 8) == (pack is tj.data.unpacked)
    found = helpers.loss_and_gradients(combined(), adapter, batch, accumulate)
    np.testing.assert_allclose(found[0], plain()[0], rtol=0, atol=1e-5)
    helpers.assert_close(found[1], plain()[1], 1e-5)


def test_a_mesh_gives_the_same_loss_and_gradients():
    """With shared prompts; see below for other meshes."""
    mesh = helpers.mesh_of(2, 1, 2)
    model = tj.models.random_model(toy.CONFIG, jax.random.key(0), mesh=mesh)
    model = model.with_params(helpers.randomised(model.params, 0.12))
    method = tj.peft.lora(rank=2)
    adapter = helpers.trained(method, model.params)
    policy = tj.policy(model, method)
    loss = tj.losses.dpo(policy, tj.reference(model), beta=0.05) + 0.1 * tj.losses.sft(policy)
    found = helpers.loss_and_gradients(loss, adapter, placed(model_batch(), mesh))
    np.testing.assert_allclose(found[0], plain()[0], rtol=0, atol=1e-5)
    helpers.assert_close(found[1], plain()[1], 2e-5)  # sums in another order, without vectors


def placed(batch, mesh):
    return jax.device_put(batch, tj.parallel.rows(mesh))


@pytree
class NarrowReference:
    """A reference that needs no model."""

    params: Any

    def __call__(self, batch, where=None):
        return bigram.Narrow()(self.params, batch, None, where)


@pytest.mark.parametrize("split", [(4, 1, 1), (1, 4, 1)])
def test_any_mesh_gives_the_same_loss_and_gradients_of_a_policy_that_needs_no_model(split):
    batch = model_batch(tj.data.best_fit)
    batch["tokens"] %= bigram.WIDE
    found = []
    for mesh in (None, helpers.mesh_of(*split)):
        reference = NarrowReference(bigram.narrow_params(mesh, seed=1))
        loss = tj.losses.dpo(bigram.Narrow(), reference, beta=0.05)
        rows = batch if mesh is None else placed(batch, mesh)
        found.append(helpers.loss_and_gradients(loss, bigram.narrow_params(mesh), rows))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=0, atol=1e-5)
    helpers.assert_close(found[1][1], found[0][1], 2e-5)


def test_a_fresh_adapter_is_the_reference():
    model, method, _ = model_and_adapter()
    state = tj.train.init(method.init(jax.random.key(0), model.params), helpers.keep_gradients)
    _, metrics = helpers.gradient_step()(
        state, combined(beta=0.1, share=0.0), model_batch(share=False)
    )
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    assert metrics["rewards/margins"] == 0


def test_dropout_reaches_the_policy_and_not_the_reference():
    """At a fresh adapter dropout changes nothing, so the margin is still zero; at a trained one it does."""
    model, _, _ = model_and_adapter()
    method = tj.peft.lora(rank=2, dropout=0.5)
    adapter = helpers.trained(method, model.params)
    loss = tj.losses.dpo(tj.policy(model, method), tj.reference(model))
    batch = model_batch()
    with_key, again = (call(loss, adapter, batch, jax.random.key(i))[1] for i in (0, 1))
    assert with_key["logps/chosen"] != again["logps/chosen"]
    ours = with_key["logps/chosen"] - with_key["rewards/chosen"] / 0.1
    theirs = again["logps/chosen"] - again["rewards/chosen"] / 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_it_adds_up_with_supervised_fine_tuning_and_trains():
    model, method, _ = model_and_adapter()
    tx = optax.adam(1e-2)

    @jax.jit
    def moved(params, state, grads):
        with jax.numpy_dtype_promotion("standard"):  # Optax counts on it
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = method.init(jax.random.key(0), model.params)
    loss, batch = combined(beta=0.1), model_batch(share=False)
    opt_state, traces = tx.init(params), []
    for _ in range(12):
        state = tj.train.init(params, helpers.keep_gradients)
        state, metrics = helpers.gradient_step()(state, loss, batch)
        params, opt_state = moved(params, opt_state, state.opt_state)
        traces.append(float(metrics["loss"]))
    assert metrics["rewards/accuracies"] == 1
    assert traces[-1] < 0.7 * traces[0]
