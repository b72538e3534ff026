import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainjax import train
from trainjax.train import fit
from trainjax.types import Loss

TX = optax.sgd(0.1)


class Batches:
    """Two rows of three tokens; the last of the second row is padding."""

    def __init__(self):
        self.taken = 0

    def __next__(self):
        self.taken += 1
        rows = np.asarray([[0, 0, 0], [1, 1, -1]], np.int32) + 2 * (self.taken - 1)
        rows[1, 2] = -1
        return {"x": jnp.full((2, 3), float(self.taken)), "rows": jnp.asarray(rows)}

    def get_state(self):
        return {"batch": self.taken}

    def set_state(self, state):
        self.taken = state["batch"]


def _loss(inputs, params, batch, key):
    del inputs, key
    value = jnp.mean((params["w"] - batch["x"]) ** 2)
    return value, {"error": jnp.abs(value)}


loss = Loss(_loss)


def start():
    return train.init({"w": jnp.zeros(())}, TX, key=0)


def run(steps=6, state=None, step=None, **options):
    """A run with a sink that keeps the records."""
    records = []
    state = fit(
        state or start(),
        step or train.make_step(TX),
        loss,
        options.pop("batches", Batches()),
        steps=steps,
        sinks=[records.append],
        **options,
    )
    return state, records


class Saved(train.Checkpoints):
    """Keeps what it is asked to save, and writes nothing."""

    def __init__(self):
        self.steps, self.extras, self.waited = [], [], 0

    def save(self, state, extra):
        self.steps.append(int(state.step))
        self.extras.append(extra)

    def newest(self):
        return f"checkpoint {self.steps[-1]}"

    def wait(self):
        self.waited += 1


def test_every_sink_gets_a_record_of_every_step_in_order():
    first, second = [], []
    fit(start(), train.make_step(TX), loss, Batches(), steps=4, sinks=[first.append, second.append])
    assert [record["step"] for record in first] == [1, 2, 3, 4]
    assert first == second
    expected = {"step", "loss", "error", "grad_norm", "num_tokens", "tokens_per_second", "seconds"}
    assert set(first[0]) == expected | {"peak_memory_bytes"}
    assert all(isinstance(value, int | float) for value in first[0].values())


def test_the_records_are_those_of_the_steps_taken_by_hand():
    state, step, batches, expected = start(), train.make_step(TX), Batches(), []
    for _ in range(4):
        state, metrics = step(state, loss, next(batches))
        expected.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    found, records = run(4)
    assert [(record["loss"], record["grad_norm"]) for record in records] == expected
    assert found.params["w"] == state.params["w"]


def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_read():
    events, made = [], train.make_step(TX)

    def step(state, loss, batch):
        events.append(f"step {int(state.step) + 1}")
        return made(state, loss, batch)

    def read(record):
        events.append(f"read {record['step']}")

    fit(start(), step, loss, Batches(), steps=4, sinks=[read])
    assert events == [
        "step 1",
        "step 2",
        "read 1",
        "step 3",
        "read 2",
        "step 4",
        "read 3",
        "read 4",
    ]


def test_num_tokens_adds_up_the_real_tokens_on_top_of_those_seen_before():
    _, records = run(3, num_tokens=100)
    assert [record["num_tokens"] for record in records] == [105, 110, 115]


def test_derived_metrics_are_in_the_record():
    _, records = run(2, derived=lambda record: record | {"twice": 2 * record["step"]})
    assert [record["twice"] for record in records] == [2, 4]


def test_a_resumed_state_goes_on_where_it_stood():
    whole, records = run(6)
    batches = Batches()
    half, first = run(4, batches=batches)
    resumed, rest = run(6, state=half, batches=batches, num_tokens=first[-1]["num_tokens"])
    keys = ("step", "loss", "grad_norm", "num_tokens")
    exact = lambda records: [[record[key] for key in keys] for record in records]  # noqa: E731
    assert exact(first + rest) == exact(records)
    assert resumed.params["w"] == whole.params["w"]


def test_a_state_with_all_steps_done_is_given_back():
    state, _ = run(3)
    again, records = run(3, state=state)
    assert again is state
    assert records == []


@pytest.mark.parametrize(
    ("every", "expected"), [(0, [6]), (1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (9, [6])]
)
def test_it_saves_every_so_often_and_at_the_end(every, expected):
    saved = Saved()
    run(6, checkpoints=saved, save_every=every, settings={"seed": 3})
    assert saved.steps == expected
    assert saved.waited == 1
    for step, extra in zip(saved.steps, saved.extras, strict=True):
        assert extra == {
            "batches": {"batch": step},
            "num_tokens": 5 * step,
            "settings": {"seed": 3},
        }


@pytest.mark.parametrize(("every", "expected"), [(0, [6]), (1, [1, 2, 3, 4, 5, 6]), (4, [4, 6])])
def test_it_evaluates_every_so_often_and_at_the_end(every, expected):
    seen = []

    def evaluate(params):
        seen.append(float(params["w"]))
        return {"eval_loss": seen[-1]}

    state, records = run(6, evaluate=evaluate, eval_every=every)
    evals = [record for record in records if "eval_loss" in record]
    assert [record["step"] for record in evals] == expected
    assert [record["eval_loss"] for record in evals] == seen
    assert seen[-1] == float(state.params["w"])
    after = [records[i - 1] for i, record in enumerate(records) if record in evals]
    assert [record["step"] for record in after] == expected  # the step's own record is before it


class TestSignals:
    @pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
    def test_one_ends_the_run_after_the_step_under_way_and_saves(self, sent):
        saved = Saved()

        def derived(record):
            if record["step"] == 2:
                signal.raise_signal(sent)
            return record

        with pytest.raises(train.Stopped, match=f"stopped by {sent.name} after step 3") as stop:
            run(50, checkpoints=saved, derived=derived)
        assert (stop.value.signal, stop.value.step) == (sent, 3)
        assert saved.steps == [3]
        assert saved.extras[0]["num_tokens"] == 15  # the third step's too

    def test_a_second_interrupt_stops_at_once(self):
        def twice(record):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            return record

        with pytest.raises(KeyboardInterrupt):
            run(50, derived=twice)

    def test_handlers_are_put_back_whatever_happens(self):
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        run(2)
        with pytest.raises(ZeroDivisionError):
            run(2, derived=lambda record: 1 / 0)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    def test_in_another_thread_they_are_left_alone(self):
        before, inside = signal.getsignal(signal.SIGTERM), []

        def derived(record):
            inside.append(signal.getsignal(signal.SIGTERM))
            return record

        thread = threading.Thread(target=lambda: inside.append(run(2, derived=derived)[1]))
        thread.start()
        thread.join()
        *handlers, records = inside
        assert handlers == [before, before]
        assert len(records) == 2


class TestNotFinite:
    class Broken(Batches):
        def __next__(self):
            batch = super().__next__()
            return batch | {"x": batch["x"] / (0.0 if self.taken == 3 else 1.0)}

    def test_it_names_step_values_rows_and_checkpoint(self):
        saved = Saved()
        with pytest.raises(train.NotFinite) as error:
            run(6, checkpoints=saved, save_every=1, batches=self.Broken())
        assert str(error.value) == (
            "step 3: loss=inf, grad_norm=inf is not finite, on rows [4, 5] of the data; the newest "
            "checkpoint is checkpoint 2"
        )
        assert saved.steps == [1, 2]

    def test_without_checkpoints_it_says_none(self):
        with pytest.raises(train.NotFinite, match="the newest checkpoint is none"):
            run(6, batches=self.Broken())

    def test_its_step_is_not_reported(self):
        records = []
        with pytest.raises(train.NotFinite):
            fit(start(), train.make_step(TX), loss, self.Broken(), steps=6, sinks=[records.append])
        assert [record["step"] for record in records] == [1, 2]


def test_an_evaluator_adds_up_the_batches_of_a_pass():
    def weighted(inputs, params, batch, key):
        assert (inputs, key) == ((), None)
        value = jnp.sum(params["w"] * batch["weights"])
        return value, {"entropy": 2 * value}

    halves = [{"weights": jnp.asarray([0.5])}] * 2
    evaluate = train.evaluator(Loss(weighted), lambda: iter(halves))
    found = evaluate({"w": jnp.asarray(3.0)})
    assert found == {"eval_loss": 3.0, "eval_entropy": 6.0}
    assert evaluate({"w": jnp.asarray(3.0)}) == found  # a pass of its own each time


def test_the_loop_holds_no_state_of_its_own():
    first, second = run(5)[1], run(5)[1]
    assert [record["loss"] for record in first] == [record["loss"] for record in second]
    assert jax.tree.leaves(start().params)[0] == 0
