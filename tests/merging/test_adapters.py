"""Adapters of one base merged into one; `test_peft.py` compares with PEFT's."""

import json

import numpy as np
import pytest

from trainjax import merging
from trainjax.io import peft as files
from trainjax.merging import adapters, merge_adapters
from trainjax.types import PeftFiles

SIDES = {"model.layers.0.q_proj": (6, 8), "model.layers.0.up_proj": (10, 8)}
"""Modules with a matrix of so many outputs and inputs."""


def write(path, rank, seed=0, modules=SIDES, fingerprint=None, tensors=None, **fields):
    """Writes an adapter with random factors and returns what it adds, by module, in float64."""
    rng = np.random.default_rng(seed)
    made, added = {}, {}
    for module in modules:
        rows, columns = SIDES[module]
        a, b = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
        made[f"{module}.lora_A.weight"] = a.astype(np.float32)
        made[f"{module}.lora_B.weight"] = b.astype(np.float32)
        added[module] = 2 / rank * (b @ a)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "task_type": "CAUSAL_LM"}
    settings |= {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": True}
    files.write(path, PeftFiles(settings | fields, made | (tensors or {})), fingerprint)
    return added


def added_by(path):
    found, _ = files.read(path)
    assert found.fields["lora_alpha"] == found.fields["r"]
    modules = {name.rpartition(".lora_")[0] for name in found.tensors}
    return {
        module: found.tensors[f"{module}.lora_B.weight"].astype(np.float64)
        @ found.tensors[f"{module}.lora_A.weight"]
        for module in modules
    }


@pytest.fixture
def two(tmp_path):
    """Two folders, of the ranks 2 and 3, and what they add."""
    paths = [tmp_path / "one", tmp_path / "two"]
    return paths, [write(path, rank, rank) for path, rank in zip(paths, (2, 3), strict=True)]


def weighted(added, weights):
    parts = zip(weights, added, strict=True)
    return sum(weight * part for weight, part in parts)


@pytest.mark.parametrize("combine", [adapters.cat, adapters.svd(5)], ids=["cat", "svd"])
def test_with_the_sum_of_the_ranks_it_is_the_weighted_sum(two, tmp_path, combine):
    paths, added = two
    merge_adapters(tmp_path / "out", combine, paths, [0.5, -2.0])
    for module, found in added_by(tmp_path / "out").items():
        expected = weighted([each[module] for each in added], [0.5, -2.0])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd_is_the_nearest_matrix_of_the_rank(two, tmp_path, rank):
    """Eckart and Young: what is missing has the norm of the singular values that were cut."""
    paths, added = two
    merge_adapters(tmp_path / "out", adapters.svd(rank), paths)
    for module, found in added_by(tmp_path / "out").items():
        whole = added[0][module] + added[1][module]
        cut = np.linalg.svd(whole, compute_uv=False)[rank:]
        assert np.linalg.matrix_rank(found, tol=1e-4) == rank
        np.testing.assert_allclose(np.linalg.norm(whole - found), np.linalg.norm(cut), rtol=1e-5)


def test_svd_makes_no_matrix_of_the_base(monkeypatch):
    """Of a base of 3000 x 4000 the largest array has a side of at most the ranks' sum."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4000), np.float32), rng.standard_normal((3000, 2), np.float32)
    seen = []
    real = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda x, **k: (seen.append(x.shape), real(x, **k))[1])
    adapters.svd(2)([adapters.Update(a, b), adapters.Update(a, -b)], [1.0, 0.5])
    assert seen == [(4, 4)]


def test_by_default_the_rank_is_the_largest_and_weights_are_one(two, tmp_path):
    paths, _ = two
    merge_adapters(tmp_path / "out", adapters.svd(), paths)
    merge_adapters(tmp_path / "ones", adapters.svd(3), paths, [1.0, 1.0])
    assert files.read(tmp_path / "out")[0].fields["r"] == 3
    for module, found in added_by(tmp_path / "out").items():
        np.testing.assert_array_equal(found, added_by(tmp_path / "ones")[module])


def test_a_dense_method_makes_one_of_the_updates(two, tmp_path):
    paths, added = two
    combine = adapters.dense_svd(merging.task_arithmetic, 5)
    merge_adapters(tmp_path / "out", combine, paths, [1.0, 0.5])
    for module, found in added_by(tmp_path / "out").items():
        expected = weighted([each[module] for each in added], [1.0, 0.5])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_module_that_one_adapter_lacks_is_the_others(tmp_path):
    q, up = SIDES
    one = write(tmp_path / "one", 2, 1, modules=[q])
    two = write(tmp_path / "two", 3, 2)
    merge_adapters(tmp_path / "out", adapters.cat, [tmp_path / "one", tmp_path / "two"])
    found = added_by(tmp_path / "out")
    np.testing.assert_allclose(found[q], one[q] + two[q], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[up], two[up], rtol=0, atol=1e-5)
    fields = files.read(tmp_path / "out")[0].fields
    assert (fields["r"], fields["rank_pattern"], fields["alpha_pattern"]) == (5, {up: 3}, {up: 3})


def test_scales_follow_rslora_and_patterns(tmp_path):
    q, up = SIDES
    plain = write(tmp_path / "one", 2, 1)
    write(tmp_path / "two", 2, 1, use_rslora=True, alpha_pattern={"up_proj": 6})
    merge_adapters(tmp_path / "out", adapters.cat, [tmp_path / "one", tmp_path / "two"], [0.0, 1.0])
    found = added_by(tmp_path / "out")
    np.testing.assert_allclose(found[q], plain[q] * np.sqrt(2), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[up], plain[up] * 3 * np.sqrt(2), rtol=0, atol=1e-5)


def test_what_it_is_of_is_kept(two, tmp_path):
    write(tmp_path / "one", 2, base_model_name_or_path="base", fingerprint="0123abcd")
    write(tmp_path / "two", 2, fingerprint="0123abcd")
    merge_adapters(tmp_path / "out", adapters.cat, [tmp_path / "one", tmp_path / "two"])
    found, fingerprint = files.read(tmp_path / "out")
    assert (found.fields["base_model_name_or_path"], fingerprint) == ("base", "0123abcd")
    assert found.fields["target_modules"] == ["q_proj", "up_proj"]


def test_of_adapters_of_some_layers_the_modules_are_named_in_full(tmp_path):
    write(tmp_path / "one", 2, layers_to_transform=[0])
    write(tmp_path / "two", 2)
    merge_adapters(tmp_path / "out", adapters.cat, [tmp_path / "one", tmp_path / "two"])
    assert files.read(tmp_path / "out")[0].fields["target_modules"] == sorted(SIDES)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "VERA"}, "other is an adapter of peft_type='VERA'; LORA is merged"),
        ({"use_dora": True}, "other sets use_dora=True, which cannot be merged"),
        ({"use_qalora": True}, "other sets use_qalora=True, which cannot be merged"),
        ({"modules_to_save": ["lm_head"]}, "other sets modules_to_save=.*which cannot be merged"),
        ({"init_lora_weights": "pissa"}, "other sets init_lora_weights='pissa': its base is not"),
        ({"tensors": {"score.weight": np.ones((1, 8), np.float32)}}, "other holds 'score.weight'"),
        (
            {"tensors": {"model.layers.0.q_proj.lora_A.weight": np.ones((1, 8), np.float32)}},
            "other: lora_A and lora_B of model.layers.0.q_proj do not fit one another",
        ),
        (
            {"tensors": {"model.layers.0.q_proj.lora_A.weight": np.ones((2, 9), np.float32)}},
            "q_proj: .*other is for a matrix of 6 x 9, .*one for one of 6 x 8",
        ),
        (
            {"tensors": {"model.layers.0.q_proj.lora_A.weight": np.full((2, 8), np.nan)}},
            "q_proj.lora_A.weight of .*other holds NaN",
        ),
        ({"fingerprint": "aaaaaaaa"}, r"different bases \(fingerprints 00000000, aaaaaaaa\)"),
    ],
    ids=["kind", "dora", "qalora", "copies", "pissa", "a head", "ranks", "sides", "nan", "base"],
)
def test_an_adapter_that_does_not_fit_is_named_and_nothing_is_left(tmp_path, changes, sentence):
    write(tmp_path / "one", 2, fingerprint="00000000")
    write(tmp_path / "other", 2, **changes)
    with pytest.raises(ValueError, match=sentence):
        merge_adapters(tmp_path / "out", adapters.cat, [tmp_path / "one", tmp_path / "other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_different_bases_may_be_meant(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, 2, fingerprint=name)
    paths = [tmp_path / "one", tmp_path / "two"]
    merge_adapters(tmp_path / "out", adapters.cat, paths, other_base=True)
    assert files.read(tmp_path / "out")[1] is None


def test_factors_of_different_ranks_cannot_be_added(two, tmp_path):
    with pytest.raises(ValueError, match=r"ranks \[2, 3\] cannot be added; cat and svd"):
        merge_adapters(tmp_path / "out", adapters.linear, two[0])


def test_a_wrong_number_of_weights_is_refused(two, tmp_path):
    with pytest.raises(ValueError, match="1 weights for 2 adapters"):
        merge_adapters(tmp_path / "out", adapters.cat, two[0], [1.0])


@pytest.mark.parametrize(
    "make", [adapters.svd, lambda rank: adapters.dense_svd(merging.task_arithmetic, rank)]
)
def test_a_rank_below_one_is_refused(make):
    with pytest.raises(ValueError, match="rank=0: a rank is at least 1"):
        make(0)


def test_a_folder_that_holds_something_is_not_written_over(two, tmp_path):
    before = (tmp_path / "one" / "adapter_config.json").read_text()
    with pytest.raises(ValueError, match="one exists already"):
        merge_adapters(tmp_path / "one", adapters.cat, two[0])
    assert (tmp_path / "one" / "adapter_config.json").read_text() == before
    assert json.loads(before)["r"] == 2
