import contextlib
import json
from collections.abc import Collection, Iterator

import jax
import numpy as np
import pytest

from tests import toy
from trainjax import data, parallel
from trainjax.data.pipeline import own_rows


@pytest.fixture(scope="module")
def examples():
    return data.encode(toy.rows(40), toy.tokenizer(), 128)


def plan(**changes):
    return data.Plan(**{"batch_size": 4, "length": 128, "seed": 0} | changes)


def epoch(examples, plan, number=0):
    return [data.fill(examples, plan, batch) for batch in plan.epoch(examples, number)]


PLANS = {
    "packed": plan(),
    "unpacked": plan(pack=data.unpacked),
    "in order": plan(seed=None),
    "windows": plan(window=16),
    "sequence mean": plan(weigh=data.sequence_mean),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@each_plan
def test_an_epoch_holds_every_token_once(examples, plan):
    batches = epoch(examples, plan)
    seen = [
        (row, token)
        for batch in batches
        for row, token in zip(batch["rows"].ravel(), batch["tokens"].ravel(), strict=True)
        if row >= 0
    ]
    expected = [
        (row, token)
        for i, row in enumerate(examples.rows)
        for token in examples.tokens[examples.slice_of(i)]
    ]
    assert sorted(seen) == sorted(expected)


@each_plan
def test_weights_sum_to_one_and_stand_on_targets_only(examples, plan):
    for batch in epoch(examples, plan):
        assert batch["weights"].sum() == pytest.approx(1.0, abs=1e-6)
        assert (batch["weights"][batch["rows"] < 0] == 0).all()
        assert (batch["weights"][:, 0] == 0).all()


def test_sequence_mean_gives_every_example_the_same_weight(examples):
    batch = epoch(examples, PLANS["sequence mean"])[0]
    rows = np.unique(batch["rows"][batch["rows"] >= 0])
    each = [batch["weights"][batch["rows"] == row].sum() for row in rows]
    np.testing.assert_allclose(each, 1 / len(rows), rtol=1e-5)


def test_packed_examples_are_segments_whose_positions_restart(examples):
    for batch in epoch(examples, PLANS["packed"]):
        for rows, segments, positions in zip(
            batch["rows"], batch["segments"], batch["positions"], strict=True
        ):
            assert ((segments > 0) == (rows >= 0)).all()
            for segment in range(1, segments.max() + 1):
                here = np.flatnonzero(segments == segment)
                assert len(np.unique(rows[here])) == 1
                assert positions[here].tolist() == list(range(len(here)))


def test_unpacked_batches_have_few_lengths_and_no_segments(examples):
    batches = epoch(examples, plan(pack=data.unpacked, buckets=4))
    assert len({batch["tokens"].shape[1] for batch in batches}) <= 4
    assert all("segments" not in batch for batch in batches)


def test_the_order_changes_with_epoch_and_seed_and_not_otherwise(examples):
    first, again = plan().epoch(examples, 0), plan().epoch(examples, 0)
    assert first == again
    assert first != plan().epoch(examples, 1)
    assert first != plan(seed=1).epoch(examples, 0)


def test_without_a_seed_unpacked_rows_keep_their_order(examples):
    batches = epoch(examples, plan(seed=None, pack=data.unpacked))
    order = [row for batch in batches for row in batch["rows"][:, 0] if row >= 0]
    assert order == examples.rows.tolist()


@pytest.mark.parametrize("taken", [0, 1, 3, 11, 25])
def test_a_restored_loader_continues_exactly(examples, taken):
    loader = data.Loader(examples, plan())
    for _ in range(taken):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = [jax.device_get(next(loader)) for _ in range(6)]
    restored = data.Loader(examples, plan())
    restored.set_state(state)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, batch, jax.device_get(next(restored)))


def test_one_pass_for_evaluation_weighs_the_whole_data(examples):
    batches = list(data.one_epoch(examples, plan()))
    assert sum(float(batch["weights"].sum()) for batch in batches) == pytest.approx(1.0, abs=1e-5)


def test_rows_are_split_over_the_mesh(examples):
    mesh = parallel.mesh(data=2, fsdp=2)
    batch = next(data.Loader(examples, plan(), mesh))
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(1, 128)}
    alone = next(data.Loader(examples, plan()))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(batch), jax.device_get(alone))


@pytest.fixture
def owned(monkeypatch):
    """A context in which all devices but these are another process's."""

    @contextlib.contextmanager
    def owned(devices: Collection[int]) -> Iterator[None]:
        every = jax.sharding.NamedSharding.devices_indices_map

        def own(self, shape):
            return {d: rows for d, rows in every(self, shape).items() if d.id in devices}

        with monkeypatch.context() as patch:
            patch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", own)
            yield

    return owned


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_fill_the_rows_of_the_same_global_batch(examples, processes, owned):
    batch = plan().epoch(examples, 0)[0]
    mesh, parts = parallel.mesh(data=2, fsdp=2), []
    for devices in np.split(np.arange(4), processes):
        with owned(devices):
            parts.append(data.fill(examples, plan(), batch, rows=own_rows(4, mesh)))
    whole = data.fill(examples, plan(), plan().epoch(examples, 0)[0])
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


@pytest.mark.parametrize(
    ("axes", "devices", "expected"),
    [
        (("data", "fsdp", "tensor"), [0, 1], slice(0, 4)),
        (("data", "fsdp", "tensor"), [2, 3], slice(4, 8)),
        (("tensor", "data", "fsdp"), [0, 1], slice(0, 8)),  # both row shards are this process's
        (("tensor", "data", "fsdp"), [0], slice(0, 4)),
    ],
)
def test_a_process_fills_the_rows_of_its_own_devices(axes, devices, expected, owned):
    """Of a mesh of two row shards and two of `tensor`."""
    sizes = {"data": 2, "fsdp": 1, "tensor": 2}
    grid = np.asarray(jax.devices()).reshape([sizes[axis] for axis in axes])
    with owned(devices):
        assert own_rows(8, jax.sharding.Mesh(grid, axes)) == expected


def test_rows_that_are_not_side_by_side_are_refused(owned):
    mesh = parallel.mesh(data=4, fsdp=1)
    with (
        owned([0, 2]),
        pytest.raises(ValueError, match="rows of the batch that are not side by side"),
    ):
        own_rows(8, mesh)


def test_a_batch_that_the_mesh_does_not_divide_is_refused(examples):
    with pytest.raises(
        ValueError, match="batch_size=6 is not divisible by the mesh's 4 row shards"
    ):
        data.Loader(examples, plan(batch_size=6), parallel.mesh(fsdp=4))


def test_rows_that_the_sequence_axis_does_not_divide_are_refused(examples):
    mesh = parallel.mesh(fsdp=1, sequence=4)
    message = "rows of 130 tokens are not divisible by the mesh's sequence=4; use 132"
    with pytest.raises(ValueError, match=message):
        data.Loader(examples, plan(length=130), mesh)


def test_rows_shorter_than_an_example_are_refused(examples):
    with pytest.raises(ValueError, match="an example has .* tokens, a row 16"):
        plan(length=16).epoch(examples, 0)


def test_supervised_takes_rows_as_well_as_a_file(tmp_path):
    rows = toy.rows(8)
    file = toy.write_jsonl(tmp_path / "rows.jsonl", rows)
    both = (
        next(data.supervised(source, toy.tokenizer(), batch_size=2, max_length=128))
        for source in (rows, file)
    )
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, both))
