"""Supervised fine-tuning: the formulas in float64, and losses and gradients of transformers, PEFT, TRL."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import families, helpers
from trainjax import tree
from trainjax.losses import dco, dft, reward_weighted, sft, unlikelihood
from trainjax.losses.sft import coverage_factor, exponential_weights, log1m, nll
from trainjax.models import load, load_adapter, save_adapter, save_model
from trainjax.ops.vocab import NO_EXTRAS, token_stats
from trainjax.policies import policy
from trainjax.types import Loss, pytree


def test_loss_is_the_weighted_negative_log_likelihood():
    logprobs = jnp.asarray([[-1.0, -2.0], [-3.0, -5.0]])
    weights = jnp.asarray([[0.5, 0.25], [0.0, 0.25]])
    assert float(nll(logprobs, weights)) == 0.5 * 1 + 0.25 * 2 + 0.25 * 5


def test_loss_and_accuracy_are_those_of_all_the_logits():
    """Token t is predicted from what is before it, and the first is nobody's target."""
    model, batch = helpers.tiny(), helpers.random_batch(rows=2)
    call = jax.jit(lambda loss, *args: loss(*args))
    loss, metrics = call(sft(policy(model)), model.params, batch)
    logits = np.asarray(model.logits(batch["tokens"]), np.float64)[:, :-1]
    targets, weights = batch["tokens"][:, 1:], batch["weights"][:, 1:]
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    chosen = np.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, -(weights * chosen).sum(), rtol=1e-6)
    hits = (weights * (logits.argmax(-1) == targets)).sum()
    np.testing.assert_allclose(metrics["mean_token_accuracy"], hits, rtol=1e-6)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families.ADAPTERS)
def test_loss_and_gradients_are_those_of_transformers_with_peft(tmp_path, name):
    """Prompts masked with -100, rows of several lengths padded on the right."""
    import torch

    family, settings = families.ADAPTERS[name]
    base = families.torch_model(family)
    base.save_pretrained(tmp_path / "base")
    theirs = families.torch_adapter(base, settings)
    theirs.save_pretrained(tmp_path / "adapter")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, (4, 12)).astype(np.int32)
    at, lengths, prompts = (
        np.arange(12)[None],
        np.array([[12], [7], [9], [3]]),
        np.array([[4], [1], [6], [2]]),
    )
    trained = (at >= prompts) & (at < lengths)
    labels = torch.from_numpy(np.where(trained, tokens, -100)).long()
    mask = torch.from_numpy((at < lengths).astype(np.int64))
    out = theirs(torch.from_numpy(tokens).long(), attention_mask=mask, labels=labels)
    out.loss.backward()

    model = load(tmp_path / "base")
    method, adapter = load_adapter(tmp_path / "adapter", model)
    batch = {"tokens": tokens, "weights": (trained / trained.sum()).astype(np.float32)}
    loss, gradients = helpers.loss_and_gradients(sft(policy(model, method)), adapter, batch)
    np.testing.assert_allclose(loss, out.loss.item(), rtol=0, atol=1e-5)
    save_adapter(tmp_path / "gradients", model, method, tree.unflatten(gradients))
    ours = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    expected = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }
    helpers.assert_close({name: ours[name] for name in expected}, expected, 1e-5)


# --- the variants, on a model of two tokens ----------------------------------------------------------

VOCAB = 7


@pytree
class Bigram:
    """A policy whose logits are a row of its params for each previous token."""

    def __call__(self, params, batch, key=None, where=None, extras=NO_EXTRAS):
        tokens = jnp.asarray(batch["tokens"])
        hidden, where = params["table"][jnp.roll(tokens, 1, axis=1)], jnp.asarray(where)
        return token_stats(hidden, jnp.eye(VOCAB), tokens, where, extras=extras)


def table(scale: float = 1.0) -> dict[str, jax.Array]:
    noise = np.random.default_rng(5).standard_normal((VOCAB, VOCAB), np.float32)
    return {"table": jnp.asarray(np.float32(scale) * noise)}


def scored_batch() -> dict[str, np.ndarray]:
    """Two packed examples a row, each of one weight and one score; some tokens are no targets."""
    rng = np.random.default_rng(1)
    segments = np.repeat([[1] * 5 + [2] * 4 + [0]], 4, axis=0).astype(np.int32)
    weighs = (rng.random(segments.shape) < 0.7) & (segments > 0)
    weighs[:, [0, 5]] = False
    each = np.take_along_axis(rng.uniform(0.5, 1.5, (4, 3)), segments, axis=1) * weighs
    scores = np.take_along_axis(rng.standard_normal((4, 3)), segments, axis=1)
    return {
        "tokens": rng.integers(0, VOCAB, segments.shape, np.int32),
        "segments": segments,
        "weights": (each / each.sum()).astype(np.float32),
        "token_scores": scores.astype(np.float32),
    }


class Exact(NamedTuple):
    """What a reference in float64 may read: of each token, `[batch, seq]`."""

    logp: np.ndarray
    logits: np.ndarray
    weights: np.ndarray
    scores: np.ndarray
    completions: list[tuple[float, np.ndarray]]
    """The weight of each completion's tokens, and which they are."""


def exact(params: np.ndarray) -> Exact:
    batch = scored_batch()
    logits = params[np.roll(batch["tokens"], 1, axis=1)]
    logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    chosen = np.take_along_axis(logp, batch["tokens"][..., None], axis=-1)[..., 0]
    weights = batch["weights"].astype(np.float64)
    completions = []
    for row in range(4):
        for segment in (1, 2):
            here = np.zeros(weights.shape, bool)
            here[row] = (batch["segments"][row] == segment) & (weights[row] > 0)
            if here.any():
                completions.append((weights[here][0], here))
    return Exact(chosen, logits, weights, batch["token_scores"].astype(np.float64), completions)


def plain(e: Exact, at: Exact) -> float:
    return -(e.weights * e.logp).sum()


def smoothed(e: Exact, at: Exact) -> float:
    """All the log-probabilities, against the smoothed target."""
    logp = e.logits - np.logaddexp.reduce(e.logits, axis=-1, keepdims=True)
    return 0.9 * plain(e, at) - 0.1 * (e.weights * logp.mean(-1)).sum()


def with_z_loss(e: Exact, at: Exact) -> float:
    return plain(e, at) + 0.01 * (e.weights * np.logaddexp.reduce(e.logits, axis=-1) ** 2).sum()


def dynamic(e: Exact, at: Exact) -> float:
    return -(e.weights * np.exp(at.logp) * e.logp).sum()


def coverage(e: Exact, at: Exact) -> float:
    """The loss itself, and not what has its gradient."""
    p = [np.exp(e.logp[here].sum()) for _, here in e.completions]
    weights = [weight for weight, _ in e.completions]
    return -sum(w * np.log(1 - (1 - q) ** 8) for w, q in zip(weights, p, strict=True))


def unlikely(e: Exact, at: Exact) -> float:
    bad = 0.5 * np.log(1 - np.exp(e.logp))
    return -(e.weights * np.where(e.scores >= 0.2, e.logp, bad)).sum()


def by_reward(e: Exact, at: Exact) -> float:
    return -(e.weights * np.minimum(np.exp((e.scores - 0.1) / 0.5), 3.0) * e.logp).sum()


Reference = Callable[[Exact, Exact], float]

VARIANTS: dict[str, tuple[Loss, Reference]] = {
    "sft": (sft(Bigram()), plain),
    "label_smoothing": (sft(Bigram(), label_smoothing=0.1), smoothed),
    "z_loss": (sft(Bigram(), z_loss=0.01), with_z_loss),
    "dft": (dft(Bigram()), dynamic),
    "dco": (dco(Bigram(), num_samples=8), coverage),
    "unlikelihood": (unlikelihood(Bigram(), threshold=0.2, alpha=0.5), unlikely),
    "reward_weighted": (reward_weighted(Bigram(), 0.5, 0.1, max_weight=3.0), by_reward),
}
"""Losses, and what they are in float64: of the params, and of those where the gradient is taken (which
a stop-gradient holds on to).
"""

EACH = pytest.mark.parametrize("name", VARIANTS)


@jax.jit
def computed(loss: Loss, params: Any, batch: Any) -> Any:
    return loss(params, batch)


@jax.jit
def value_and_gradient(loss: Loss, params: Any, batch: Any) -> Any:
    return jax.value_and_grad(loss, has_aux=True)(params, batch)


@EACH
def test_variants_are_their_formulas_and_have_their_gradients_by_finite_differences(name):
    loss, reference = VARIANTS[name]
    params = table()
    (value, metrics), gradient = value_and_gradient(loss, params, scored_batch())
    start, step = np.asarray(params["table"], np.float64), 1e-5
    at = exact(start)
    if name != "dco":  # whose value is cross-entropy's, times a factor
        np.testing.assert_allclose(value, reference(at, at), rtol=1e-6)
    differences = np.zeros_like(start)
    for place in np.ndindex(start.shape):
        nudge = np.zeros_like(start)
        nudge[place] = step
        up, down = exact(start + nudge), exact(start - nudge)
        differences[place] = (reference(up, at) - reference(down, at)) / (2 * step)
    np.testing.assert_allclose(gradient["table"], differences, rtol=0, atol=1e-6)
    if name != "sft":
        np.testing.assert_allclose(metrics["nll"], plain(at, at), rtol=1e-6)


@EACH
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_values_and_gradients_are_finite_for_extreme_logits(name, scale):
    """Tokens whose probability is 1 or 0 in float32, and completions that are never drawn."""
    (value, metrics), gradient = value_and_gradient(VARIANTS[name][0], table(scale), scored_batch())
    for leaf in jax.tree.leaves((value, metrics, gradient)):
        assert np.isfinite(leaf).all()


@EACH
def test_micro_batches_add_up_to_the_batch(name):
    """Two of them, or four, which are of one row each."""
    loss, batch = VARIANTS[name][0], scored_batch()
    (whole, _), expected = value_and_gradient(loss, table(), batch)
    accumulate = 2 if list(VARIANTS).index(name) % 2 else 4
    value, gradients = helpers.loss_and_gradients(loss, table(), batch, accumulate)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    helpers.assert_close(gradients, expected, 1e-6)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (sft(Bigram(), label_smoothing=0.1), sft(Bigram(), label_smoothing=0.2, z_loss=0.1)),
        (dco(Bigram(), num_samples=2), dco(Bigram(), num_samples=3)),
        (unlikelihood(Bigram(), threshold=0.0), unlikelihood(Bigram(), threshold=1.0, alpha=2.0)),
        (
            reward_weighted(Bigram()),
            reward_weighted(Bigram(), beta=2.0, baseline=1.0, max_weight=5.0),
        ),
    ],
    ids=["sft", "dco", "unlikelihood", "reward_weighted"],
)
def test_other_coefficients_run_the_same_program(one, other):
    traces = []

    @jax.jit
    def run(loss, params, batch):
        traces.append(loss)
        return loss(params, batch)[0]

    assert float(run(one, table(), scored_batch())) != float(run(other, table(), scored_batch()))
    assert len(traces) == 1


def test_options_that_are_off_leave_the_program_of_plain_cross_entropy():
    def program(loss: Loss) -> str:
        return str(jax.make_jaxpr(computed)(loss, table(), scored_batch()))

    assert program(sft(Bigram(), label_smoothing=0.0, z_loss=0.0)) == program(sft(Bigram()))
    assert sft(Bigram()).inputs == Bigram()
    assert set(computed(sft(Bigram()), table(), scored_batch())[1]) == {"mean_token_accuracy"}


def test_coverage_of_one_sample_is_cross_entropy():
    one, two = (
        value_and_gradient(loss, table(), scored_batch())
        for loss in (dco(Bigram(), num_samples=1), sft(Bigram()))
    )
    np.testing.assert_allclose(one[0][0], two[0][0], rtol=1e-6)
    np.testing.assert_allclose(one[1]["table"], two[1]["table"], rtol=0, atol=1e-7)


def test_coverage_without_segments_takes_a_row_as_one_completion():
    batch = {name: value for name, value in scored_batch().items() if name != "segments"}
    ones = batch | {"segments": np.ones(batch["tokens"].shape, np.int32)}
    loss = dco(Bigram(), num_samples=8)
    one, other = (computed(loss, table(), given)[0] for given in (batch, ones))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("num_samples", [1.0, 2.0, 64.0, 1e6])
def test_the_coverage_factor_is_its_formula_from_certain_to_never_drawn(num_samples):
    """In float64 `(1 - p)^N = exp(N log1p(-p))`; below p = 1e-280 the factor is its limit, 1."""
    logp = np.concatenate([-np.geomspace(1e-4, 600, 200), [-1e4]])
    p = np.exp(logp)
    rest = num_samples * np.log1p(-p)
    with np.errstate(invalid="ignore"):
        expected = num_samples * p / (1 - p) * np.exp(rest) / -np.expm1(rest)
    expected = np.where(p > 1e-280, expected, 1.0)
    found = coverage_factor(jnp.asarray(logp, jnp.float32), jnp.float32(num_samples))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    certain = coverage_factor(jnp.float32(0.0), jnp.float32(num_samples))
    np.testing.assert_allclose(certain, float(num_samples == 1), rtol=0, atol=1e-6)


def test_a_certain_token_of_low_score_still_has_a_slope():
    """Of the exact form it is infinite; here `log(1 - p)` ends at `log(1e-6)` with slope 1e6."""
    value, slope = jax.value_and_grad(log1m)(jnp.float32(0.0))
    np.testing.assert_allclose([value, slope], [np.log(1e-6), -1e6], rtol=1e-5)
    logp = jnp.linspace(-20.0, -1e-2, 50)
    expected = np.log(-np.expm1(np.asarray(logp, np.float64)))
    np.testing.assert_allclose(log1m(logp), expected, rtol=0, atol=1e-4)


def test_weights_of_a_score_end_at_the_cap_without_overflow():
    scores = jnp.asarray([-1e30, 0.0, 1.0, 1e30])
    found = exponential_weights(scores, 0.5, 0.0, np.float32(np.log(20.0)))
    np.testing.assert_allclose(found, [0.0, 1.0, np.exp(2.0), 20.0], rtol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda: unlikelihood(Bigram(), 0.0), lambda: reward_weighted(Bigram())]
)
def test_a_batch_without_scores_is_refused_in_a_sentence(make):
    batch = {name: value for name, value in scored_batch().items() if name != "token_scores"}
    with pytest.raises(ValueError, match="the batch has no `token_scores`"):
        computed(make(), table(), batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sft(Bigram(), label_smoothing=1.0), "label_smoothing=1.0 is no share"),
        (lambda: sft(Bigram(), z_loss=-0.1), "z_loss=-0.1 would reward large logits"),
        (lambda: dco(Bigram(), num_samples=0), "num_samples=0: coverage is of one sample"),
        (lambda: unlikelihood(Bigram(), 0.0, alpha=-1.0), "alpha=-1.0 would raise"),
        (lambda: reward_weighted(Bigram(), beta=0.0), "beta=0.0 is no temperature"),
        (lambda: reward_weighted(Bigram(), max_weight=0.0), "max_weight=0.0 leaves nothing"),
    ],
)
def test_impossible_coefficients_are_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- TRL ---------------------------------------------------------------------------------------------

TRL: dict[str, Callable[[Any], Loss]] = {
    "nll": sft,
    "dft": dft,
    "label_smoothing": lambda policy: sft(policy, label_smoothing=0.1),
}
"""Our losses by the names of `golden/make_sft.py`."""


def one_of_all(policy: Any, name: str) -> Loss:
    """The loss of this name, in the program of all of them: the others' coefficients are 0."""
    return sum(float(other == name) * make(policy).named(other) for other, make in TRL.items())


def ours(folder: Path, name: str, tokens: np.ndarray, trained: np.ndarray):
    """The loss and its gradients by the parameters' names in transformers."""
    model = load(folder)
    batch = {"tokens": tokens, "weights": (trained / trained.sum()).astype(np.float32)}
    loss, gradients = helpers.loss_and_gradients(
        one_of_all(policy(model), name), model.params, batch
    )
    gradients = jax.device_put(tree.unflatten(gradients))
    save_model(folder / "gradients", model.with_params(gradients))
    return loss, load_file(folder / "gradients" / "model.safetensors")


@pytest.mark.parametrize("name", TRL)
def test_losses_and_gradients_are_those_that_trl_gave(tmp_path, name):
    golden = json.loads((helpers.GOLDEN / "sft.json").read_text())
    with zipfile.ZipFile(helpers.GOLDEN / "llama.zip") as archive:
        for member in ("config.json", "model.safetensors"):
            archive.extract(f"{golden['family']}/{member}", tmp_path)
    tokens, trained = np.array(golden["tokens"], np.int32), np.array(golden["trained"], bool)
    loss, gradients = ours(tmp_path / golden["family"], name, tokens, trained)
    expected = golden["losses"][name]
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=1e-5)
    expected = {name: np.array(value) for name, value in expected["gradients"].items()}
    helpers.assert_close({name: gradients[name] for name in expected}, expected, 1e-5)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRL)
def test_losses_and_all_gradients_are_those_of_trl(tmp_path, name):
    from tests.golden import make_sft

    arrays, theirs = make_sft.batch(), make_sft.model()
    theirs.save_pretrained(tmp_path)
    expected = make_sft.trl_loss(theirs, arrays, **make_sft.LOSSES[name])
    expected.backward()
    loss, gradients = ours(tmp_path, name, arrays["tokens"], arrays["trained"])
    np.testing.assert_allclose(loss, expected.item(), rtol=0, atol=1e-5)
    helpers.assert_close(gradients, make_sft.trl_gradients(theirs), 1e-5)
