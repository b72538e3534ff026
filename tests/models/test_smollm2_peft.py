"""Every method that PEFT has too, on the real model: the same function and the same training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import families, helpers
from tests.models.test_peft_methods import trace
from trainjax.models import load, load_adapter, save_model

pytestmark = [
    pytest.mark.real,
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.usefixtures("optimised"),
    pytest.mark.filterwarnings("ignore"),  # of torch and transformers
]

SEQ, STEPS = 24, families.STEPS
LEARNING_RATE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers reads it, in float32."""
    path = tmp_path_factory.mktemp("smollm2") / "model"
    save_model(path, load(helpers.smollm2()))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """The model in transformers, to be copied: PEFT writes into what it wraps."""
    import torch
    import transformers

    found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found.loss_function = exact_loss
    return found


def wrapped(base: Any, name: str) -> Any:
    """PEFT's wrapper of a copy of the real model, with a little noise on what trains."""
    import peft
    import torch

    _, kind, settings = families.METHODS[name]
    base = copy.deepcopy(base)
    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
    found = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter_name, parameter in found.named_parameters():
            if parameter.requires_grad:
                rng = np.random.default_rng([*parameter_name.encode()])
                noise = torch.from_numpy(rng.standard_normal(parameter.shape)).float()
                parameter.copy_(start(name, found, parameter) + 0.02 * noise)
    return found


def exact_loss(logits: Any, labels: Any, **_: Any) -> Any:
    """Mean cross-entropy of the next token, in float64.

    torch's own in float32 is what keeps transformers' gradients 2e-5 to 1e-4 of their norm away from
    float64's, also in a float64 model, whose logits it narrows; with this one they are within 1e-13 of
    them, and ours within 1.5e-5.
    """
    from torch.nn import functional

    return functional.cross_entropy(logits[:, :-1].double().mT, labels[:, 1:])


def start(name: str, wrapped: Any, parameter: Any) -> Any:
    """PEFT's own start; for virtual tokens embeddings, or keys and values, of tokens of a text.

    PEFT draws prompts ten times as large as embeddings are. At such, and near random keys and values of
    any size, the real model's function is so steep that float32 sums in another order drift apart by
    more than 1e-5, and in training by more with every step.
    """
    import torch

    first = [1, 2683, 198]
    if name == "prompt":
        return wrapped.get_input_embeddings().weight[first]
    if not name.startswith("prefix"):
        return parameter
    ids = torch.tensor([first[: len(parameter)]])
    layers = wrapped.get_base_model()(ids, use_cache=True).past_key_values.layers
    kept = torch.cat([part for layer in layers for part in (layer.keys, layer.values)])
    return kept.permute(2, 0, 1, 3).reshape(parameter.shape)


def batches(tokenizer: Any) -> np.ndarray:
    """Rows of a real text, one after another: `[STEPS, 1, SEQ]`."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = np.asarray(tokenizer.encode(text)[: STEPS * SEQ], np.int32)
    return ids.reshape(STEPS, 1, SEQ)


# That of PEFT for a base without groups is `prefix` on this base, which has them.
METHODS = [name for name in families.METHODS if name != "prefix_without_groups"]


@pytest.mark.parametrize("name", METHODS)
def test_it_computes_and_trains_as_peft_does(theirs, model, tmp_path, name):
    import torch

    from tests.golden.make_peft import trace as trace_of_peft

    adapted = wrapped(theirs, name)
    adapted.save_pretrained(tmp_path)
    rows = batches(model.tokenizer)
    with torch.no_grad():
        logits = adapted.eval()(torch.from_numpy(rows[0]).long()).logits[:, -SEQ:].numpy()
    expected = trace_of_peft(adapted, rows, LEARNING_RATE)

    method, adapter = load_adapter(tmp_path, model)
    found = model.with_params(method.attach(model.params, adapter)).logits(rows[0])
    helpers.assert_close({"logits": found}, {"logits": logits}, 1e-5)
    losses = trace(model, method, adapter, rows, LEARNING_RATE)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)
