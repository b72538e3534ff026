"""Rules: which axis of the mesh splits which axis of a parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import helpers
from trainjax import parallel, tree
from trainjax.axes import num_row_shards
from trainjax.peft import lora


def mesh():
    return helpers.mesh_of(1, 2, 2)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers/attention/query/kernel", (3, 8, 16), P(None, "fsdp", "tensor")),
        ("layers/mlp/down/kernel", (3, 16, 8), P(None, "tensor", "fsdp")),
        ("layers/mlp/up/bias", (3, 16), P(None, "tensor")),
        ("layers/attention/output/bias", (3, 8), P(None, None)),
        ("layers/mlp_norm/scale", (3, 8), P(None, None)),
        ("embed/embedding", (60, 8), P("tensor", "fsdp")),
        ("head/kernel", (8, 60), P("fsdp", "tensor")),
        ("head/kernel", (8, 61), P("fsdp", None)),  # 2 does not divide 61
        ("layers/attention/key/kernel", (3, 7, 5), P(None, None, None)),
        ("something/else", (8,), P(None)),
    ],
)
def test_a_parameter_is_split_by_the_first_rule_where_the_mesh_divides_it(name, shape, expected):
    assert parallel.spec(name, shape, mesh()) == expected


def test_rules_of_ones_own_go_in_order():
    rules = ((r"up", P("data")), (r"up/kernel", P("tensor")), (r"", P()))
    assert parallel.spec("mlp/up/kernel", (4, 4), mesh(), rules) == P(None, "data")


def test_both_products_of_a_pair_are_split_along_the_axis_between_them():
    """So that one sum a pair crosses devices, and not two."""
    for first, second in (("attention/value", "attention/output"), ("mlp/up", "mlp/down")):
        outputs = parallel.spec(f"{first}/kernel", (8, 8), mesh())[-1]
        inputs = parallel.spec(f"{second}/kernel", (8, 8), mesh())[-2]
        assert outputs == inputs == "tensor"


def test_placed_params_lie_by_the_rules_and_are_the_same():
    params = helpers.tiny().params
    placed = parallel.place(params, mesh())
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == parallel.shardings(params, mesh())
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    up = placed["layers"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.shape == (2, 32 // 2, 48 // 2)


def test_without_a_mesh_params_stay_where_they_are():
    params = helpers.tiny().params
    assert parallel.place(params, None) is params


def test_shardings_of_abstract_shapes_are_those_of_arrays():
    params = helpers.tiny().params
    abstract = jax.eval_shape(lambda: params)
    assert parallel.shardings(abstract, mesh()) == parallel.shardings(params, mesh())


def test_rows_are_split_over_data_and_fsdp():
    grid = helpers.mesh_of(2, 2, 1)
    batch = jax.device_put(jnp.arange(8), parallel.rows(grid))
    assert [shard.data.tolist() for shard in batch.addressable_shards] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    assert (num_row_shards(grid), num_row_shards(mesh()), num_row_shards(None)) == (4, 2, 1)


def test_factors_of_lora_follow_their_matrix_and_the_rank_is_not_split():
    """A along the inputs, B along the outputs."""
    model = helpers.tiny(mesh=mesh())
    adapter = lora(rank=2, target="mlp/(up|down)").init(jax.random.key(0), model.params)
    found = {name: leaf.sharding for name, leaf in tree.flatten(adapter).items()}
    expected = {
        "layers/mlp/down/kernel/a": P(None, "tensor", None),
        "layers/mlp/down/kernel/b": P(None, None, "fsdp"),
        "layers/mlp/up/kernel/a": P(None, "fsdp", None),
        "layers/mlp/up/kernel/b": P(None, None, "tensor"),
    }
    for name, spec in expected.items():
        assert found[name].is_equivalent_to(NamedSharding(mesh(), spec), 3), name
