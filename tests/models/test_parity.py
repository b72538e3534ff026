"""Live comparison with transformers and PEFT: the same function there and here, both ways."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import families, helpers
from trainjax.models import Model, load, load_adapter, save_adapter, save_model
from trainjax.peft import lora

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # theirs: deprecations of one another
]

TOKENS = np.random.default_rng(1).integers(0, 48, (3, 17)).astype(np.int32)
ADAPTERS = pytest.mark.parametrize("name", families.ADAPTERS)


def torch_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.float().numpy()


def pretrained(path: Path, **options):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def assert_same_logits(found, expected, tolerance: float = 1e-5) -> None:
    helpers.assert_close({"logits": found}, {"logits": expected}, tolerance)


def tensors_of(folder: Path) -> dict[str, bytes]:
    files = folder.glob("*.safetensors")
    return {k: (v.dtype, v.tobytes()) for file in files for k, v in load_file(file).items()}


class Theirs(NamedTuple):
    """A model of transformers, where it has saved itself, and the same as it is loaded here."""

    model: Any
    folder: Path
    ours: Model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Callable[[str], Theirs]:
    """Each made once; no test may change one."""

    def make(name: str) -> Theirs:
        model, folder = families.torch_model(name), tmp_path_factory.mktemp("theirs")
        model.save_pretrained(folder)
        return Theirs(model, folder, load(folder))

    return functools.cache(make)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_saved_model_of_transformers_is_the_same_function_here(theirs, tmp_path, name):
    model, folder, ours = theirs(name)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    for path, in_shards in ((folder, False), (tmp_path, True)):
        assert (len(list(path.glob("*.safetensors"))) > 1) == in_shards
    assert_same_logits(ours.logits(TOKENS), torch_logits(model))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path).params, ours.params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_model_that_went_through_here_is_bitwise_the_same_in_transformers(
    theirs, tmp_path, name, dtype
):
    import torch

    _, folder, ours = theirs(name)
    if dtype == "bfloat16":
        folder = tmp_path / "theirs"
        families.torch_model(name).to(torch.bfloat16).save_pretrained(folder)
        ours = load(folder)
    save_model(tmp_path / "ours", ours)
    assert tensors_of(tmp_path / "ours") == tensors_of(folder)
    found, expected = pretrained(tmp_path / "ours"), pretrained(folder)
    assert found.dtype == expected.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(torch_logits(found), torch_logits(expected))


@ADAPTERS
def test_an_adapter_of_peft_is_the_same_function_here_and_again_in_peft(theirs, tmp_path, name):
    """Attached or merged; and in PEFT after it went through here."""
    import peft

    family, settings = families.ADAPTERS[name]
    _, folder, base = theirs(family)
    first = families.torch_adapter(pretrained(folder), settings)
    first.save_pretrained(tmp_path / "adapter")
    expected = torch_logits(first)
    method, adapter = load_adapter(tmp_path / "adapter", base)
    for params in (method.attach(base.params, adapter), method.merge(base.params, adapter)):
        assert_same_logits(base.with_params(params).logits(TOKENS), expected)
    save_adapter(tmp_path / "ours", base, method, adapter)
    second = peft.PeftModel.from_pretrained(pretrained(folder), tmp_path / "ours")
    assert_same_logits(torch_logits(second), expected)
    assert_same_logits(torch_logits(first.merge_and_unload()), expected)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama_grouped", {"rank": 3, "alpha": 5.0}),
        ("llama_biased_llama3", {"rank": 4, "rslora": True, "target": "attention/(query|output)"}),
        ("llama_wide_heads", {"rank": 2, "target": "head|layers/mlp"}),
        (
            "qwen2",
            {
                "rank": 2,
                "target": "attention|down",
                "rank_pattern": {"layers/1/.*query": 4, "layers/./mlp": 1},
                "alpha_pattern": {"layers/0/attention": 3.0},
            },
        ),
    ],
    ids=["all", "rslora", "head", "patterns"],
)
def test_an_adapter_made_here_is_the_same_function_in_peft(theirs, tmp_path, family, settings):
    import peft

    _, folder, base = theirs(family)
    method = lora(**settings)
    adapter = helpers.trained(method, base.params)
    save_adapter(tmp_path / "adapter", base, method, adapter)
    in_peft = peft.PeftModel.from_pretrained(pretrained(folder), tmp_path / "adapter")
    expected = torch_logits(in_peft)
    found = base.with_params(method.attach(base.params, adapter)).logits(TOKENS)
    assert_same_logits(found, expected, 1e-4)
    save_model(tmp_path / "merged", base, method.merge(base.params, adapter))
    assert_same_logits(torch_logits(pretrained(tmp_path / "merged")), expected)


def test_every_field_of_a_plain_configuration_of_peft_is_known(theirs, tmp_path):
    """A field that PEFT adds later must be decided on, whether or not it has an effect."""
    _, folder, base = theirs("llama_tied")
    settings = {"r": 2, "target_modules": ["q_proj"]}
    families.torch_adapter(pretrained(folder), settings).save_pretrained(tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(fields) > 30
    load_adapter(tmp_path / "adapter", base)
