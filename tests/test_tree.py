"""Names, selections, replacements, casts and counts of trees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainjax import tree
from trainjax.ops.head import Tied
from trainjax.types import Frozen


def params() -> dict:
    return {
        "embed": {"embedding": jnp.ones((3, 2))},
        "layers": {"mlp": {"up": {"kernel": jnp.zeros((2, 4), jnp.bfloat16)}}},
        "steps": jnp.arange(5, dtype=jnp.int32),
    }


NAMES = ["embed/embedding", "layers/mlp/up/kernel", "steps"]


def test_names_are_the_keys_joined_and_unflatten_is_the_inverse():
    named = tree.flatten(params())
    assert list(named) == NAMES
    jax.tree.map(np.testing.assert_array_equal, tree.unflatten(named), params())


def test_a_weight_is_one_leaf():
    weight = Tied(jnp.ones((3, 2)))
    nested = {"head": {"kernel": weight}}
    assert tree.flatten(nested) == {"head/kernel": weight}
    assert tree.map_named(lambda name, leaf: (name, leaf.shape), nested) == {
        "head": {"kernel": ("head/kernel", (2, 3))}
    }


def test_names_of_sequences_and_dataclasses_are_indices_and_fields():
    nested = {"a": [1, (2,)], "head": Tied(jnp.ones((1, 1)))}
    found = tree.map_named(lambda name, *_: name, nested)
    assert found == {"a": ["a/0", ("a/1/0",)], "head": "head"}


def test_select_takes_what_the_regex_matches_anywhere_in_the_name():
    assert list(tree.select(params(), r"mlp|^embed")) == NAMES[:2]
    assert list(tree.select(params(), r"kernel$")) == NAMES[1:2]


def test_select_without_a_match_lists_the_names():
    with pytest.raises(ValueError, match=f"matches 'attention'; the names are {', '.join(NAMES)}"):
        tree.select(params(), "attention")


def test_select_of_a_bad_regex_says_where_it_is_bad():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression: .*position 0"):
        tree.select(params(), "(")


def test_replace_swaps_the_named_leaves_and_keeps_the_other_objects():
    old = params()
    new = tree.replace(old, {"embed/embedding": 7})
    assert new["embed"] == {"embedding": 7}
    assert new["steps"] is old["steps"]
    assert old["embed"]["embedding"].shape == (3, 2)


def test_replace_of_an_unknown_name_suggests_the_nearest():
    with pytest.raises(
        KeyError, match="'layers/mlp/upp/kernel'; did you mean 'layers/mlp/up/kernel'"
    ):
        tree.replace(params(), {"layers/mlp/upp/kernel": 0})


@pytest.mark.parametrize(("word", "hint"), [("attn", "; did you mean 'attention'?"), ("zzz", "")])
def test_nearest_suggests_only_what_looks_alike(word, hint):
    assert tree.nearest(word, ["attention", "mlp"]) == hint


def test_count_and_bytes_are_of_all_arrays():
    assert tree.count(params()) == 3 * 2 + 2 * 4 + 5
    assert tree.num_bytes(params()) == 4 * 6 + 2 * 8 + 4 * 5


def test_cast_changes_floats_only():
    found = tree.cast(params(), jnp.float16)
    dtypes = [leaf.dtype for leaf in tree.flatten(found).values()]
    assert dtypes == [jnp.float16, jnp.float16, jnp.int32]


def test_keys_differ_by_name_and_are_the_same_in_another_process():
    """As they were in the process that these numbers are from; `hash(str)` is not."""
    key = jax.random.key(0)
    found = [jax.random.key_data(tree.key_for(key, name)).tolist() for name in ("a", "b")]
    assert found == [[208555866, 2927674385], [1023922862, 306676512]]


@pytest.mark.parametrize(("bad", "finite"), [(1.0, True), (np.nan, False), (-np.inf, False)])
def test_all_finite_looks_at_every_number(bad, finite):
    assert bool(tree.all_finite({"a": jnp.ones(3), "b": jnp.asarray([0.0, bad])})) == finite


def with_frozen():
    return {"a": Frozen(jnp.ones(2)), "b": {"c": jnp.zeros(3), "d": Frozen({"e": jnp.ones(1)})}}


def test_what_is_frozen_is_not_trainable_and_stays_when_the_rest_is_replaced():
    trained = tree.trainable(with_frozen())
    assert list(tree.flatten(trained)) == ["b/c"]
    moved = tree.with_trained(with_frozen(), jax.tree.map(lambda x: x + 5, trained))
    assert jax.tree.structure(moved) == jax.tree.structure(with_frozen())
    np.testing.assert_array_equal(moved["b"]["c"], [5, 5, 5])
    np.testing.assert_array_equal(moved["a"].value, [1, 1])


def test_thawed_parts_are_plain_arrays_without_a_gradient():
    def total(params):
        return sum(leaf.sum() for leaf in jax.tree.leaves(tree.thawed(params)))

    assert list(tree.flatten(tree.thawed(with_frozen()))) == ["a", "b/c", "b/d/e"]
    gradient = jax.grad(total)(with_frozen())
    np.testing.assert_array_equal(gradient["b"]["c"], [1, 1, 1])
    assert not gradient["a"].value.any()
