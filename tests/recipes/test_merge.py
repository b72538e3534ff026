"""`trainjax merge` of several models or adapters; `test_bad_input.py` has that of an adapter."""

import dataclasses
import typing

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import helpers, toy
from trainjax import cli, merging, models
from trainjax.merging import merge_tensor
from trainjax.peft import lora
from trainjax.recipes import _merging
from trainjax.recipes import merge as job


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Folders of a base and of two models."""
    path = tmp_path_factory.mktemp("models")
    return [toy.model_folder(path / name, seed) for seed, name in enumerate(("base", "one", "two"))]


@pytest.fixture(scope="module")
def two_adapters(three, tmp_path_factory):
    """Folders of two adapters of the base."""
    base, method = models.load(three[0]), lora(rank=2, alpha=4.0)
    paths = [tmp_path_factory.mktemp("adapters") / name for name in ("one", "two")]
    for seed, path in enumerate(paths):
        adapter = helpers.trained(method, base.params, seed=seed)
        models.save_adapter(path, base, method, adapter)
    return paths


@pytest.fixture
def merge(tmp_path):
    """Runs `trainjax merge` into the test's own folder, `out`."""
    return lambda *args: cli.main(["merge", "--out", str(tmp_path / "out"), *map(str, args)])


def tensors(folder):
    return load_file(folder / "model.safetensors")


METHODS = {
    "linear": ([], merging.linear([1.0, 1.0])),
    "linear --no-normalize": (["--weights", 1, -0.5], merging.linear([1.0, -0.5], normalize=False)),
    "task_arithmetic": (["--weights", 1, -0.5], merging.task_arithmetic([1.0, -0.5])),
    "ties --scale 0.7": (
        ["--weights", 1, 0.5, "--density", 0.5],
        merging.ties([1.0, 0.5], 0.5, scale=0.7),
    ),
    "dare_linear --seed 3": (["--density", 0.5], merging.dare_linear([1.0, 1.0], 0.5, seed=3)),
    "dare_ties": (["--density", 0.5], merging.dare_ties([1.0, 1.0], 0.5)),
    "slerp": (["--t", 0.25], merging.slerp(0.25)),
    "model_stock": ([], merging.model_stock()),
    "instruction_residual": (["--scale", 0.7], merging.instruction_residual(0.7)),
    "timber": (["--gamma", 0.2], merging.timber(0.2)),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_name_and_settings(merge, three, tmp_path, name):
    flags, method = METHODS[name]
    base, *others = three
    others = others[: method.most]
    start = ["--model", base] if method.needs_base else []
    assert merge("--method", *name.split(), *start, "--models", *others, *flags) == 0
    found = tensors(tmp_path / "out")
    of_base, *of_models = map(tensors, (base, *others))
    for tensor in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        expected = merge_tensor(
            method,
            of_base[tensor] if method.needs_base else None,
            [own[tensor] for own in of_models],
            tensor,
        )
        np.testing.assert_allclose(found[tensor], expected, rtol=0, atol=1e-6)


def test_the_names_of_the_methods_are_those_of_the_flag():
    names = set(typing.get_args(_merging.MethodName))
    assert names == _merging.OF_MODELS.keys() | _merging.OF_ADAPTERS.keys()
    assert {name.partition(" ")[0] for name in METHODS} == _merging.OF_MODELS.keys()


def test_the_merged_model_is_of_the_dtype_and_named_on_the_output(merge, three, tmp_path, capsys):
    assert merge("--method", "linear", "--models", *three[1:], "--dtype", "bfloat16") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    loaded = models.load(tmp_path / "out")
    assert loaded.params["norm"]["scale"].dtype == jax.numpy.bfloat16


@pytest.mark.parametrize(
    ("flags", "rank"),
    [
        (["cat"], 4),
        (["svd", "--rank", 3], 3),
        (["linear"], 2),
        (["ties_svd", "--density", 0.5], 2),
    ],
    ids=["cat", "svd", "linear", "ties_svd"],
)
def test_adapters_are_merged_into_one_that_loads(merge, three, two_adapters, tmp_path, flags, rank):
    assert merge("--method", *flags, "--adapters", *two_adapters, "--weights", 1, -0.5) == 0
    base = models.load(three[0])
    _, adapter = models.load_adapter(tmp_path / "out", base)
    assert adapter["layers"]["attention"]["query"]["kernel"]["a"].shape == (2, 32, rank)


def test_adapters_side_by_side_are_both_in_the_model(merge, three, two_adapters, tmp_path):
    assert merge("--method", "cat", "--adapters", *two_adapters, "--weights", 1, -0.5) == 0
    base = models.load(three[0])
    merged, one, two = (
        method.merge(base.params, adapter)
        for method, adapter in (
            models.load_adapter(path, base) for path in (tmp_path / "out", *two_adapters)
        )
    )
    jax.tree.map(
        lambda w, m, a, b: np.testing.assert_allclose(
            m, w + (a - w) - 0.5 * (b - w), rtol=0, atol=1e-5
        ),
        *(base.params, merged, one, two),
    )


@pytest.fixture
def said(capsys):
    """The one line in which the failure was explained."""
    return lambda: capsys.readouterr().err.strip().splitlines()[-1]


TIES = ["--method", "ties", "--density", 0.5]


@pytest.mark.parametrize(
    ("flags", "status", "sentence"),
    [
        ([], 1, "give --adapter to put one into --model, or --models or --adapters to merge"),
        (["--models", "A", "--adapters", "B"], 1, "give --adapter to put one into --model, or"),
        (["--models", "A", "B"], 1, "--models needs --method, one of linear, task_arithmetic, "),
        (["--method", "tise", "--models", "A"], 2, "--method is one of linear, task_arithmetic, "),
        (["--method", "cat", "--models", "A"], 1, "--method cat does not merge models; linear, "),
        (["--method", "ties", "--adapters", "A"], 1, "ties does not merge adapters; cat, svd, "),
        ([*TIES, "--models", "A", "B"], 1, "--method ties needs --model, the base that --models"),
        (
            ["--method", "linear", "--model", "M", "--models", "A", "B"],
            1,
            "--method linear has no base: give --model among --models",
        ),
        (
            [*TIES, "--model", "M", "--models", "A", "B", "--weights", 1],
            1,
            "--weights has 1 numbers for 2 to merge",
        ),
        (["--method", "ties", "--model", "M", "--models", "A"], 1, "ties needs --density"),
        (["--method", "slerp", "--models", "A", "B"], 1, "--method slerp needs --t"),
        (
            ["--method", "ties", "--density", 1.5, "--model", "M", "--models", "A", "B"],
            1,
            "density=1.5 is not in (0, 1]",
        ),
        (
            ["--method", "slerp", "--t", 0.5, "--models", "A", "B", "--density", 0.5],
            1,
            "--method slerp takes no --density",
        ),
        (
            ["--method", "svd", "--adapters", "A", "--model", "M"],
            1,
            "--method svd takes no --model",
        ),
        (["--adapter", "A", "--model", "M", "--rank", 3], 1, "--adapter takes no --rank"),
        (["--adapter", "A"], 1, "--adapter needs --model, the base that it was trained on"),
        (["--method", "slerp", "--t", 0.5, "--models", "A"], 1, "merges 2 models, not 1"),
        (["--method", "linear", "--models", "A", "B"], 1, "there is no model 'A'"),
        (["--method", "linear", "--modles", "A"], 2, "no option --modles; did you mean '--model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_command_is_explained_in_a_sentence(merge, said, tmp_path, flags, status, sentence):
    assert merge(*flags) == status
    line = said()
    assert line.startswith("error: ")
    assert sentence in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_over(merge, three, said, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert merge("--method", "linear", "--models", *three[1:]) == 1
    assert f"{tmp_path}/out exists already" in said()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_every_setting_of_a_method_is_one_of_the_job():
    import inspect

    known = {field.name for field in dataclasses.fields(job.Config)}
    for make in (*_merging.OF_MODELS.values(), *_merging.OF_ADAPTERS.values()):
        unknown = inspect.signature(make).parameters.keys() - known
        assert unknown <= {"consensus"}  # a function, for notebooks
