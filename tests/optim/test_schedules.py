import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainjax.optim import schedules

PEAK, STEPS, WARMUP = 3e-3, 40, 8.0
NORMS = np.linspace(3.0, 1.0, STEPS)
COUNTS = np.arange(128, dtype=np.int32)
ALL = {
    "constant": schedules.constant,
    "linear": schedules.linear,
    "polynomial": schedules.polynomial,
    "step_decay": schedules.step_decay,
    "warmup_cosine": schedules.warmup_cosine,
    "cosine_restarts": schedules.cosine_restarts,
    "one_cycle": schedules.one_cycle,
    "wsd": schedules.wsd,
    "inverse_sqrt": schedules.inverse_sqrt,
    "refined": lambda *args: schedules.refined(*args, grad_norms=NORMS),
}


def values(schedule, steps):
    """Without jit, and of one number of counts, so that an operation is compiled once for all tests."""
    found = np.asarray(schedule(jnp.asarray(COUNTS)), np.float64)
    return np.broadcast_to(found, COUNTS.shape)[:steps]


def half_cosine(share):
    return (1 + math.cos(math.pi * share)) / 2


AFTER = {  # of x, the share of the 32 steps after the warm-up, in a run of 40 that peaks at 1
    "constant": (schedules.constant, {}, lambda x: 1.0),
    "linear": (schedules.linear, {"end": 0.1 * PEAK}, lambda x: 1 - 0.9 * x),
    "polynomial": (schedules.polynomial, {"power": 3.0}, lambda x: (1 - x) ** 3),
    "cosine": (schedules.warmup_cosine, {"end": 0.1 * PEAK}, lambda x: 0.1 + 0.9 * half_cosine(x)),
    "restarts": (
        schedules.cosine_restarts,
        {"cycles": 4, "decay": 0.5},
        lambda x: 0.5 ** min(int(4 * x), 3) * half_cosine(4 * x - min(int(4 * x), 3)),
    ),
    "step": (
        schedules.step_decay,
        {"boundaries": (0.5, 30.0), "factor": 0.5},
        lambda x: 0.5 ** ((8 + 32 * x >= 20) + (8 + 32 * x >= 30)),
    ),
    "one cycle": (
        schedules.one_cycle,
        {"start_factor": 10.0, "end_factor": 100.0},
        lambda x: 1e-3 + (1 - 1e-3) * half_cosine(x),
    ),
    "wsd": (schedules.wsd, {"cooldown": 0.25}, lambda x: min(1.0, (1 - x) * 32 / 10)),
    "wsd, root": (
        schedules.wsd,
        {"cooldown": 10.0, "root": True, "end": 0.2 * PEAK},
        lambda x: 1 - 0.8 * math.sqrt(max(0.0, 1 - (1 - x) * 32 / 10)),
    ),
    "inverse sqrt": (schedules.inverse_sqrt, {}, lambda x: math.sqrt(8 / (8 + 32 * x))),
}


@pytest.mark.parametrize("name", AFTER)
def test_it_is_its_formula_at_every_step(name):
    make, settings, after = AFTER[name]
    found = values(make(PEAK, STEPS, WARMUP, **settings), STEPS + 1)
    expected = [after((t - WARMUP) / (STEPS - WARMUP)) for t in range(8, STEPS + 1)]
    if name == "one cycle":
        up = [0.1 + 0.9 * (1 - half_cosine(t / WARMUP)) for t in range(8)]
    else:
        up = [t / WARMUP for t in range(8)]
    np.testing.assert_allclose(found / PEAK, [*up, *expected], rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("name", ALL)
def test_warm_up_in_steps_or_as_a_fraction_begins_at_zero_and_nothing_exceeds_the_peak(name):
    warmups = [0.0, 0.2, 8.0]
    if name not in ("step_decay", "wsd"):  # stairs and a cool-down come after the warm-up
        warmups.append(40.0)
    schedules = {warmup: ALL[name](PEAK, STEPS, warmup) for warmup in warmups}
    jitted = jax.jit(
        lambda counts: {warmup: jax.vmap(f)(counts) for warmup, f in schedules.items()}
    )(COUNTS)
    for warmup, schedule in schedules.items():
        found = values(schedule, STEPS + 5)
        assert np.isfinite(found).all()
        assert (found >= 0).all()
        assert found.max() <= PEAK * (1 + 1e-6)
        if warmup in (0.2, 8.0):
            np.testing.assert_allclose(found, values(schedules[8.0], STEPS + 5))
            assert name == "one_cycle" or found[0] == 0
        np.testing.assert_allclose(jitted[warmup][: STEPS + 5], found, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in ALL if name != "inverse_sqrt"])
def test_after_the_last_step_the_rate_stays(name):
    schedule = ALL[name](PEAK, STEPS, WARMUP)
    np.testing.assert_array_equal(values(schedule, STEPS + 9)[STEPS:], schedule(STEPS))


def test_they_are_those_of_optax_where_it_has_them():
    n = STEPS + 5
    for ours, theirs in [
        (
            schedules.warmup_cosine(PEAK, STEPS, WARMUP, 1e-4),
            optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, STEPS, 1e-4),
        ),
        (schedules.one_cycle(PEAK, STEPS), optax.cosine_onecycle_schedule(STEPS, PEAK)),
        (
            schedules.cosine_restarts(PEAK, 32, cycles=2, end=1e-4),
            optax.sgdr_schedule(
                [
                    {
                        "init_value": PEAK,
                        "peak_value": PEAK,
                        "warmup_steps": 0,
                        "decay_steps": 16,
                        "end_value": 1e-4,
                    }
                ]
                * 2
            ),
        ),
    ]:
        np.testing.assert_allclose(
            values(ours, n), values(jax.vmap(theirs), n), rtol=2e-5, atol=1e-9
        )


def test_equal_gradient_norms_refine_to_a_line_down():
    """w is one number then, and the sum over later steps falls by it with each."""
    found = values(schedules.refined(PEAK, STEPS, grad_norms=[2.0] * STEPS), STEPS + 1)
    down = np.linspace(STEPS - 1, 0, STEPS) / (STEPS - 1)
    np.testing.assert_allclose(found, PEAK * np.append(down, 0.0), rtol=1e-6, atol=1e-9)


def test_refined_rates_are_small_where_the_gradients_were_large():
    """Norms 4, 2, 1, 1, unsmoothed: w = 1/16, 1/4, 1, 1; sums after = 9/4, 2, 1, 0; rates 9/64, 1/2, 1, 0."""
    found = schedules.refined(1.0, 4, grad_norms=[4.0, 2.0, 1.0, 1.0, 9.0], smoothing=0.1)
    np.testing.assert_allclose(values(found, 5), [9 / 64, 1 / 2, 1, 0, 0], rtol=1e-6)


def test_one_wild_gradient_norm_does_not_reach_the_refined_rates():
    wild = [2.0] * STEPS
    wild[17] = 1e6
    calm = schedules.refined(PEAK, STEPS, grad_norms=[2.0] * STEPS)
    found = schedules.refined(PEAK, STEPS, grad_norms=wild)
    np.testing.assert_allclose(values(found, STEPS), values(calm, STEPS), rtol=1e-6)


def test_a_range_test_rises_by_one_factor_from_first_to_last():
    found = values(schedules.range_test(1e-6, 1e-2, 9), 10)
    np.testing.assert_allclose(found[:9], np.geomspace(1e-6, 1e-2, 9), rtol=1e-5)
    assert found[9] == pytest.approx(1e-2)


def test_a_run_that_is_all_warm_up_ends_at_the_peak():
    expected = [0, 25e-5, 5e-4, 75e-5, 1e-3, 1e-3]
    found = values(schedules.warmup_cosine(1e-3, 4, 4.0), 6)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_finite_rates(steps):
    for make in (schedules.warmup_cosine, schedules.wsd, schedules.one_cycle, schedules.linear):
        assert np.isfinite(values(make(1e-3, steps, 0.03), 5)).all()


def test_the_count_is_of_optimizer_steps():
    """Micro-batches of one step see one rate: Optax counts updates of the chain."""
    schedule = schedules.linear(1.0, 4)
    tx = optax.MultiSteps(optax.sgd(schedule), every_k_schedule=3)
    params = jnp.zeros(())
    state, seen = tx.init(params), []
    for _ in range(12):
        updates, state = tx.update(jnp.ones(()), state, params)
        seen.append(-float(updates))
    assert seen == pytest.approx([0, 0, 1.0, 0, 0, 0.75, 0, 0, 0.5, 0, 0, 0.25])


@pytest.mark.parametrize("name", [name for name in ALL if name != "refined"])
@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((-1e-3, 20), "learning_rate=-0.001 is negative"),
        ((float("nan"), 20), "learning_rate=nan is not finite"),
        ((1e-3, 20, 21.0), "warmup=21.0 is not within the run's 20 steps"),
        ((1e-3, 20, -1.0), "warmup=-1.0 is not within the run's 20 steps"),
        ((1e-3, 20, -0.5), "warmup=-0.5 is not within the run's 20 steps"),
        ((1e-3, 20, -0.01), "warmup=-0.01 is not within the run's 20 steps"),
    ],
)
def test_settings_that_make_no_schedule_are_named(name, args, sentence):
    with pytest.raises(ValueError, match=sentence):
        ALL[name](*args)


@pytest.mark.parametrize(
    ("make", "settings", "sentence"),
    [
        (schedules.linear, {"end": -1.0}, "end=-1.0 is negative"),
        (schedules.polynomial, {"power": 0.0}, "power=0.0 of a polynomial schedule is above 0"),
        (schedules.step_decay, {"factor": 0.0}, "factor=0.0 from one stair to the next"),
        (
            schedules.step_decay,
            {"boundaries": (12.0, 8.0)},
            r"boundaries=\(12.0, 8.0\) are to rise",
        ),
        (schedules.step_decay, {"boundaries": (0.5, 21.0)}, "boundaries=21.0 is not within"),
        (schedules.cosine_restarts, {"cycles": 21}, "cycles=21: at least one"),
        (schedules.cosine_restarts, {"decay": 0.0}, "decay=0.0 from one peak"),
        (schedules.one_cycle, {"start_factor": 0.5}, "start_factor=0.5 is at least 1"),
        (
            schedules.wsd,
            {"warmup": 15.0, "cooldown": 6.0},
            "together they are more than the run's 20",
        ),
        (schedules.inverse_sqrt, {"timescale": 0.0}, "timescale=0.0 is a number of steps above 0"),
        (schedules.refined, {"grad_norms": [1.0] * 19}, "19 steps, .* ends before the run's 20"),
        (schedules.refined, {"grad_norms": [1.0] * 19 + [0.0]}, r"grad_norms\[19\]=0.0 is not a"),
    ],
)
def test_what_makes_no_sense_gets_a_sentence(make, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(1e-3, 20, **settings)


def test_a_range_that_does_not_rise_is_refused():
    with pytest.raises(ValueError, match="low=0.1 and high=0.01"):
        schedules.range_test(0.1, 0.01, 5)
    with pytest.raises(ValueError, match="steps=1: a rise takes at least 2"):
        schedules.range_test(0.1, 1.0, 1)


@pytest.mark.parametrize("end", [0.0, 1e-4])
@pytest.mark.parametrize(("warmup", "first"), [(0.0, 0), (5.0, 5), (0.1, 2), (0.26, 5), (19.0, 19)])
def test_the_cosine_is_its_formula_for_every_kind_of_warm_up(warmup, first, end):
    """`first` is the number of warm-up steps in a run of 20."""

    def formula(t):
        if t < first:
            return 1e-3 * t / first
        share = min(1.0, (t - first) / (20 - first))
        return end + (1e-3 - end) * (1 + math.cos(math.pi * share)) / 2

    found = values(schedules.warmup_cosine(1e-3, 20, warmup, end), 25)
    np.testing.assert_allclose(found, [formula(t) for t in range(25)], rtol=1e-5, atol=1e-9)


def test_the_cosine_is_to_the_bit_that_of_optax():
    ours = schedules.warmup_cosine(3e-4, 100, 0.03, 1e-5)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 3, 100, 1e-5)
    np.testing.assert_array_equal(values(ours, 110), values(theirs, 110))


def test_the_peak_is_reached_and_the_end_too():
    found = values(schedules.warmup_cosine(1e-3, 50, 10.0), 51)
    assert found.argmax() == 10
    assert found[10] == pytest.approx(1e-3)
    assert found[50] == pytest.approx(0, abs=1e-10)
