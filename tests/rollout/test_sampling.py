import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainjax.rollout import greedy, sampler
from trainjax.rollout.sampling import filtered, sample

LOGITS = jnp.asarray(np.random.default_rng(0).normal(0, 2, (5, 300)), jnp.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept_by(made):
    return np.isfinite(filtered(made, LOGITS))


@pytest.mark.parametrize("k", [1, 7, 299, 300, 1000])
def test_top_k_keeps_the_k_highest(k):
    ranks = np.argsort(np.argsort(-np.asarray(LOGITS), axis=1), axis=1)
    np.testing.assert_array_equal(kept_by(sampler(top_k=k)), ranks < k)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_highest_that_sum_to_p(p):
    for row, kept in zip(np.asarray(LOGITS, np.float64), kept_by(sampler(top_p=p)), strict=True):
        order = np.argsort(-row)
        enough = int(np.searchsorted(np.cumsum(softmax(row)[order]), p)) + 1
        assert set(np.flatnonzero(kept)) == set(order[:enough])


@pytest.mark.parametrize("p", [0.01, 0.5, 0.999])
def test_min_p_keeps_those_at_least_p_times_as_probable_as_the_first(p):
    probs = softmax(np.asarray(LOGITS, np.float64))
    np.testing.assert_array_equal(
        kept_by(sampler(min_p=p)), probs >= p * probs.max(-1, keepdims=True)
    )


def test_filters_that_keep_everything_are_off():
    assert sampler(top_p=1.0, min_p=0.0) == sampler()
    assert kept_by(sampler(2.0)).all()


def test_equal_logits_at_the_edge_all_stay():
    logits = jnp.asarray([[3.0, 1.0, 1.0, 1.0, 0.0]])
    for made in (sampler(top_k=2), sampler(top_p=0.8)):
        np.testing.assert_array_equal(np.isfinite(filtered(made, logits))[0], [1, 1, 1, 1, 0])


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5, "top_p": 0.9}, {"top_k": 20}], ids=str
)
def test_draws_have_the_filtered_distribution(settings):
    draws, made = 40_000, sampler(**settings)
    rows = jnp.broadcast_to(LOGITS[0], (draws, 300))
    drawn = jax.jit(sample)(made, rows, jax.random.split(jax.random.key(0), draws))
    found = np.bincount(drawn.tokens, minlength=300)
    expected = draws * softmax(np.asarray(filtered(made, LOGITS[:1]), np.float64))[0]
    assert (found[expected == 0] == 0).all()
    likely = expected > 20
    z = (found - expected)[likely] / np.sqrt(expected[likely])
    assert np.abs(z).max() < 4.5
    assert 0.5 < np.mean(z**2) < 1.5  # chi-squared a degree of freedom


def test_logprobs_are_the_models_and_the_samplers_own():
    made, keys = sampler(0.7, top_k=9), jax.random.split(jax.random.key(1), 5)
    drawn = sample(made, LOGITS, keys)
    rows = np.arange(5), drawn.tokens
    np.testing.assert_allclose(drawn.logprobs, jax.nn.log_softmax(LOGITS)[rows], rtol=1e-5)
    cut = jax.nn.log_softmax(filtered(made, LOGITS))
    np.testing.assert_allclose(drawn.sampler_logprobs, cut[rows], rtol=1e-5, atol=1e-6)


def test_greedy_takes_the_lowest_of_equal_maxima_and_draws_nothing():
    drawn = sample(greedy, jnp.asarray([[0.0, 2.0, 2.0]]))
    assert drawn.tokens.tolist() == [1]
    assert drawn.sampler_logprobs.tolist() == [0.0]


def test_other_settings_of_one_kind_are_no_new_program():
    traces = []

    @jax.jit
    def draw(made, logits, keys):
        traces.append(1)
        return sample(made, logits, keys).tokens

    keys = jax.random.split(jax.random.key(0), 5)
    for temperature, p in ((0.5, 0.9), (2.0, 0.1)):
        draw(sampler(temperature, top_p=p), LOGITS, keys)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is not a number from 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0 would keep no token"),
        ({"top_p": 0.0}, r"top_p=0.0 is not a share in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": 1.0}, r"min_p=1.0 is not a share in \[0, 1\)"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler(**settings)
