"""Losses on pairs of completions, one of which is the better: DPO and its family.

Each loss is a function of `losses.pairs.Pairs`: the log-probabilities of chosen and rejected completions
under policy and reference. `pairwise` wires a policy and a reference into any of them, or into one of
your own:

    losses.pairwise(policy, reference, hinge, beta=0.1)
    losses.dpo(policy, reference, beta=0.1) + 0.1 * losses.sft(policy)

Notation: `c = log pi(y_w|x) - log ref(y_w|x)`, `r` the same of the rejected, `ls` the log of the sigmoid.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from trainjax.losses.coefficients import as_input, check_names, is_number, positive
from trainjax.losses.combine import as_partial
from trainjax.losses.pairs import (
    Pairs,
    Scores,
    diverged,
    metrics_of,
    pairs_of,
    reverse_kl,
    wpo_weights,
)
from trainjax.types import Batch, Extras, Loss, Metrics, Params, Policy, Reference

_ls = jax.nn.log_sigmoid

PairLoss = Callable[..., Scores]
"""`(pairs, coefficients by name) -> loss of each pair`."""


# --- with a reference ---------------------------------------------------------------------------


def sigmoid(
    pairs: Pairs, beta: float | Array = 0.1, label_smoothing: float | Array = 0.0
) -> Scores:
    """DPO: `-(1 - eps) ls(beta delta) - eps ls(-beta delta)`; `eps > 0` is conservative DPO.

    Args:
        pairs: log-probabilities.
        beta: strength of the tie to the reference, above 0.
        label_smoothing: the share `eps` of labels taken to be wrong, from 0 to below 0.5.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing, Mitchell 2023, "A note on DPO
    with noisy preferences". Agrees with TRL 1.16.
    """
    return _logistic(positive("beta", beta) * pairs.delta, _smoothing(label_smoothing))


def robust(pairs: Pairs, beta: float | Array = 0.1, label_smoothing: float | Array = 0.1) -> Scores:
    """`(-(1 - eps) ls(beta delta) + eps ls(-beta delta)) / (1 - 2 eps)`: unbiased under flipped labels.

    Source: Ray Chowdhury et al. 2024, arXiv:2403.00409, eq. 12. Agrees with TRL 1.16.
    """
    x, eps = positive("beta", beta) * pairs.delta, _smoothing(label_smoothing)
    return (-(1 - eps) * _ls(x) + eps * _ls(-x)) / (1 - 2 * eps)


def hinge(pairs: Pairs, beta: float | Array = 0.1) -> Scores:
    """`max(0, 1 - beta delta)`.

    Source: SLiC, Zhao et al. 2023, arXiv:2305.10425, normalised as in RSO, Liu et al. 2023,
    arXiv:2309.06657, eq. 11. Agrees with TRL 1.16.
    """
    return jax.nn.relu(1 - positive("beta", beta) * pairs.delta)


def ipo(pairs: Pairs, beta: float | Array = 0.1) -> Scores:
    """`(c/|y_w| - r/|y_l| - 1/(2 beta))^2`, on means over tokens, as its authors ran it.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17, with `tau = beta`. Agrees with TRL 1.16.
    """
    return (_mean_delta(pairs) - 1 / (2 * positive("beta", beta))) ** 2


def exo_pair(
    pairs: Pairs, beta: float | Array = 0.1, label_smoothing: float | Array = 1e-3
) -> Scores:
    """`s(x) (ls(x) - log(1 - eps)) + s(-x) (ls(-x) - log eps)` with `x = beta delta`: the reverse KL
    of the pair's distribution from the labels'.

    Args:
        pairs: log-probabilities.
        beta: above 0.
        label_smoothing: `eps`, above 0 and below 0.5: at 0 the loss has a pole.

    Source: Ji et al. 2024, arXiv:2402.00856, eq. 16. Agrees with TRL 1.16.
    """
    x, eps = positive("beta", beta) * pairs.delta, _smoothing(label_smoothing, pole=True)
    chosen = jax.nn.sigmoid(x) * (_ls(x) - jnp.log1p(-eps))
    return chosen + jax.nn.sigmoid(-x) * (_ls(-x) - jnp.log(eps))


def nca_pair(pairs: Pairs, beta: float | Array = 0.1) -> Scores:
    """`-ls(beta c) - ls(-beta c)/2 - ls(-beta r)/2`: keeps the chosen likelihood from falling.

    Source: Chen et al. 2024, arXiv:2402.05369, eq. 11 for two responses. Agrees with TRL 1.16.
    """
    c, r = _rewards(pairs, beta)
    return -_ls(c) - 0.5 * _ls(-c) - 0.5 * _ls(-r)


def bco_pair(pairs: Pairs, beta: float | Array = 0.1, shift: float | Array = 0.0) -> Scores:
    """`-ls(beta c - shift) - ls(-(beta r - shift))`: a classifier of good against bad.

    Args:
        pairs: log-probabilities.
        beta: above 0.
        shift: the running mean of rewards, 0 in the simple form.

    Source: Jung et al. 2024, arXiv:2404.04656, eq. 9. Agrees with TRL 1.16 at a shift of 0.
    """
    c, r = _rewards(pairs, beta)
    return -_ls(c - shift) - _ls(shift - r)


def sppo_hard(pairs: Pairs, beta: float | Array = 0.1) -> Scores:
    """`(c - 1/(2 beta))^2 + (r + 1/(2 beta))^2`: the winner wins for certain.

    Source: Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with probabilities 1 and 0. Agrees with TRL 1.16.
    """
    half = 1 / (2 * positive("beta", beta))
    return (pairs.c - half) ** 2 + (pairs.r + half) ** 2


def apo_zero(pairs: Pairs, beta: float | Array = 0.1) -> Scores:
    """`1 - s(beta c) + s(beta r)`: for chosen completions better than the model's own.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7. Agrees with TRL 1.16.
    """
    c, r = _rewards(pairs, beta)
    return 1 - jax.nn.sigmoid(c) + jax.nn.sigmoid(r)


def apo_down(pairs: Pairs, beta: float | Array = 0.1) -> Scores:
    """`s(beta c) + 1 - s(beta delta)`: for chosen completions worse than the model's own.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8. Agrees with TRL 1.16.
    """
    c, r = _rewards(pairs, beta)
    return jax.nn.sigmoid(c) + 1 - jax.nn.sigmoid(c - r)


def discopop(pairs: Pairs, beta: float | Array = 0.05, tau: float | Array = 0.05) -> Scores:
    """`(1 - m) (-ls(x)) + m exp(-x)` with `x = beta delta` and `m = s(x / tau)`.

    Args:
        pairs: log-probabilities.
        beta: above 0.
        tau: temperature of the mixture, from above 0 to 1; above 1 the exponential would win where
            `x` is far below 0.

    Source: Lu et al. 2024, arXiv:2406.08414, eq. 5. Agrees with TRL 1.16.
    """
    x, tau = positive("beta", beta) * pairs.delta, positive("tau", tau)
    # exp(-x) and m are formed together: alone, the one overflows where the other is zero.
    return -jax.nn.sigmoid(-x / tau) * _ls(x) + jnp.exp(_ls(x / tau) - x)


def sigmoid_norm(pairs: Pairs, beta: float | Array = 2.0) -> Scores:
    """`-ls(beta (c/|y_w| - r/|y_l|))`: DPO on means over tokens (LN-DPO).

    Source: Meng et al. 2024, arXiv:2405.14734, table 3; Lambert et al. 2024, arXiv:2411.15124, eq. 6.
    Agrees with TRL 1.16.
    """
    return -_ls(positive("beta", beta) * _mean_delta(pairs))


def aot(pairs: Pairs, beta: float | Array = 0.1, label_smoothing: float | Array = 0.0) -> Scores:
    """The policy's and the reference's `log p(y_w) - log p(y_l)`, sorted each over the batch, then as DPO.

    It compares distributions and not pairs, so a micro-batch is what is sorted: its result depends on
    `accumulate`.

    Source: Melnyk et al. 2024, arXiv:2406.05882, eq. 7. Agrees with TRL 1.16.
    """
    ours, theirs = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return _sorted_logistic(ours, theirs, pairs.weights, beta, label_smoothing)


def aot_unpaired(
    pairs: Pairs, beta: float | Array = 0.1, label_smoothing: float | Array = 0.0
) -> Scores:
    """`c` and `r`, sorted each over the batch, then as DPO; see `aot`.

    Source: Melnyk et al. 2024, arXiv:2406.05882, eq. 9. Agrees with TRL 1.16.
    """
    return _sorted_logistic(pairs.c, pairs.r, pairs.weights, beta, label_smoothing)


def dno(pairs: Pairs, beta: float | Array = 0.1) -> Scores:
    """`-p ls(x) - (1 - p) ls(-x)` with `x = beta delta` and `p = s(score_w - score_l)`: soft labels.

    Args:
        pairs: with margins, the difference of the scores: the column `margin` of the rows.
        beta: above 0.

    Raises:
        ValueError: pairs without margins.

    Source: Rosset et al. 2024, arXiv:2404.03715, eq. 8, with `eta = beta`.
    """
    if pairs.margins is None:
        raise ValueError(
            "dno learns from scores, and these pairs have none: give each row a margin"
        )
    x, p = positive("beta", beta) * pairs.delta, jax.nn.sigmoid(pairs.margins)
    return -p * _ls(x) - (1 - p) * _ls(-x)


# --- without one --------------------------------------------------------------------------------


def simpo(pairs: Pairs, beta: float | Array = 2.0, gamma: float | Array = 1.0) -> Scores:
    """`-ls(beta (log p(y_w)/|y_w| - log p(y_l)/|y_l|) - gamma)`.

    Args:
        pairs: log-probabilities; the reference's are not read.
        beta: above 0.
        gamma: the margin asked for.

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6. Agrees with TRL 1.16 (`simpo_gamma`).
    """
    means = pairs.chosen_mean - pairs.rejected_mean
    return -_ls(positive("beta", beta) * means - gamma)


def orpo(pairs: Pairs, beta: float | Array = 0.1) -> Scores:
    """`-log p(y_w)/|y_w| - beta ls(log odds(y_w) - log odds(y_l))`, odds of the means over tokens.

    Args:
        pairs: log-probabilities; the reference's are not read.
        beta: weight of the odds ratio, `lambda` in the paper; above 0.

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 6-7. Agrees with TRL 1.16.
    """
    chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
    ratio = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - positive("beta", beta) * _ls(ratio)


def cpo(
    pairs: Pairs,
    beta: float | Array = 0.1,
    alpha: float | Array = 1.0,
    label_smoothing: float | Array = 0.0,
) -> Scores:
    """DPO with a uniform reference, plus `alpha` times the chosen completion's mean NLL.

    Args:
        pairs: log-probabilities; the reference's are not read.
        beta: above 0.
        alpha: weight of `-log p(y_w)/|y_w|`.
        label_smoothing: as in `sigmoid`.

    Source: Xu et al. 2024, arXiv:2401.08417, eq. 3-5. Agrees with TRL 1.16.
    """
    x = positive("beta", beta) * (pairs.chosen - pairs.rejected)
    return _logistic(x, _smoothing(label_smoothing)) - alpha * pairs.chosen_mean


def rrhf(pairs: Pairs, alpha: float | Array = 1.0) -> Scores:
    """`max(0, p_l - p_w) - alpha p_w`, with `p` the mean log-probability: ranking of two, and NLL.

    Source: Yuan et al. 2023, arXiv:2304.05302, eq. 2-4, for two responses.
    """
    w, lost = pairs.chosen_mean, pairs.rejected_mean
    return jax.nn.relu(lost - w) - alpha * w


# --- by name ------------------------------------------------------------------------------------


def _needs_only_pairs(f: Any) -> bool:
    if not inspect.isfunction(f) or f.__module__ != __name__ or f.__name__.startswith("_"):
        return False
    first, *others = inspect.signature(f).parameters.values()
    return first.name == "pairs" and all(other.default is not other.empty for other in others)


LOSSES: Mapping[str, PairLoss] = {
    name: f for name, f in list(globals().items()) if _needs_only_pairs(f)
}
"""Every loss above that needs no more than pairs, by the name of its function."""
WITHOUT_REFERENCE = frozenset(LOSSES[name] for name in ("simpo", "orpo", "cpo", "rrhf"))
"""Losses of pairs that read no reference."""


# --- the wiring ---------------------------------------------------------------------------------


def pairwise(
    policy: Policy,
    reference: Reference | None,
    loss: PairLoss = sigmoid,
    *,
    divergence: Callable[[Scores], Scores] = reverse_kl,
    ld_alpha: float | None = None,
    wpo: bool = False,
    **coefficients: Any,
) -> Loss:
    """Any loss of pairs on a batch of them: the weighted mean over its pairs.

    Metrics, with TRL's names, means over pairs: `rewards/chosen`, `rewards/rejected` (beta times the
    log-ratio), `rewards/accuracies`, `rewards/margins`, `logps/chosen`, `logps/rejected`.

    Args:
        policy: `(params, batch, key, where) -> TokenStats`, called with `extras` for `wpo`.
        reference: `(batch, where) -> TokenStats`; None for a loss without one.
        loss: `(pairs, coefficients) -> losses`, from this module or of your own. It is part of the
            program: a function made anew each time would be compiled anew.
        divergence: what the loss sees in place of each log-ratio (Wang et al. 2023, arXiv:2309.16240).
        ld_alpha: weight of tokens beyond the shorter completion's length, from 0 to 1 (LD-DPO, Liu et
            al. 2024, arXiv:2409.06411); None is 1.
        wpo: weigh each pair by how likely the policy finds its completions (WPO, Zhou et al. 2024,
            arXiv:2406.11827, eq. 2).
        **coefficients: the loss's own, by their names there; arrays or numbers. They are inputs of the
            program: another value does not retrace.

    Raises:
        ValueError: a coefficient that the loss does not have or refuses; an ld_alpha outside [0, 1].
    """
    if ld_alpha is not None and not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha={ld_alpha} is a weight from 0 to 1")
    _check_coefficients(loss, coefficients)
    numbers = {name: as_input(value) for name, value in coefficients.items()}
    inputs = {
        "policy": policy,
        "reference": reference,
        "numbers": numbers,
        "ld_alpha": None if ld_alpha is None else np.float32(ld_alpha),
        "divergence": None if divergence is reverse_kl else as_partial(divergence),
    }
    return Loss(_Pairwise(loss, wpo), inputs)


def dpo(
    policy: Policy, reference: Reference, beta: float = 0.1, label_smoothing: float = 0.0
) -> Loss:
    """Direct preference optimisation: `pairwise` with `sigmoid`."""
    return pairwise(policy, reference, sigmoid, beta=beta, label_smoothing=label_smoothing)


@dataclasses.dataclass(frozen=True)
class _Pairwise:
    """The pure function of a pairwise loss, equal to another of the same settings."""

    loss: PairLoss
    wpo: bool

    def __call__(
        self, inputs: dict[str, Any], params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Array, Metrics]:
        reference, where = inputs["reference"], batch["completions"] > 0
        wanted = {"extras": Extras(collision=True)} if self.wpo else {}
        stats = inputs["policy"](params, batch, key, where=where, **wanted)
        theirs = None if reference is None else reference(batch, where=where).logprobs
        pairs = pairs_of(stats.logprobs, theirs, batch, inputs["ld_alpha"])
        each = self.loss(diverged(pairs, inputs["divergence"]), **inputs["numbers"])
        weights = pairs.weights
        if self.wpo:
            weights = weights * wpo_weights(stats.logprobs - stats.collision, batch)
        # Slots without a pair have weight 0, and might hold anything.
        value = jnp.sum(jnp.where(weights > 0, weights * each, 0.0))
        return value, metrics_of(pairs, inputs["numbers"].get("beta", 1.0))


# --- shared by the formulas -----------------------------------------------------------------------


def _logistic(x: Scores, eps: Any) -> Scores:
    return -(1 - eps) * _ls(x) - eps * _ls(-x)


def _rewards(pairs: Pairs, beta: Any) -> tuple[Scores, Scores]:
    beta = positive("beta", beta)
    return beta * pairs.c, beta * pairs.r


def _mean_delta(pairs: Pairs) -> Scores:
    chosen = pairs.c / jnp.maximum(pairs.chosen_length, 1.0)
    return chosen - pairs.r / jnp.maximum(pairs.rejected_length, 1.0)


def _sorted_logistic(one: Scores, other: Scores, weights: Scores, beta: Any, eps: Any) -> Scores:
    """As DPO on the differences of sorted values; slots without a pair are sorted behind the rest."""
    real = weights > 0
    count = jnp.sum(real)
    known = jnp.arange(real.size) < count
    first, second = (
        jnp.where(known, jnp.sort(jnp.where(real, x, jnp.inf), axis=None), 0.0)
        for x in (one, other)
    )
    x = positive("beta", beta) * (first - second)
    each = jnp.where(known, _logistic(x, _smoothing(eps)), 0.0)
    # Every slot gets the mean, since the values sorted into it are no pair's own.
    return jnp.full(weights.shape, jnp.sum(each) / jnp.maximum(count, 1).astype(each.dtype))


def _log_odds(mean: Scores) -> Scores:
    """`log(p / (1 - p))` at `log p`, kept from certainty, where it is infinite."""
    mean = jnp.minimum(mean, -1e-6)
    near = mean > -math.log(2.0)  # log(1 - exp(x)) in the form that is exact on its side
    safe_near, safe_far = jnp.where(near, mean, -0.5), jnp.where(near, -1.0, mean)
    return mean - jnp.where(near, jnp.log(-jnp.expm1(safe_near)), jnp.log1p(-jnp.exp(safe_far)))


def _smoothing(value: Any, *, pole: bool = False) -> Any:
    if is_number(value) and not (0 < value < 0.5 if pole else 0 <= value < 0.5):
        low = "above 0" if pole else "from 0"
        raise ValueError(f"label_smoothing={value}: a share of wrong labels, {low} to below 0.5")
    return value


def _check_coefficients(loss: PairLoss, coefficients: dict[str, Any]) -> None:
    """Runs the loss on one pair without computing it: a loss refuses numbers that it cannot use."""
    check_names(loss, coefficients)
    numbers = {k: float(v) for k, v in coefficients.items() if is_number(v)}
    zero = jax.ShapeDtypeStruct((), jnp.float32)
    one = (zero,) * len(Pairs._fields)
    if len(numbers) == len(coefficients):
        jax.eval_shape(lambda *fields: loss(Pairs(*fields), **numbers), *one)
