"""Every method that PEFT has too: its files, its function, and its training (`golden/make_peft.py`)."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from tests import families, helpers
from trainjax import losses, tree
from trainjax.models import load_adapter, save_adapter
from trainjax.peft import pissa
from trainjax.policies import policy
from trainjax.train import init, make_step

METHODS = pytest.mark.parametrize("name", families.METHODS)


@pytest.fixture(scope="session")
def trained_by_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a method, with what it computes and how it trains."""
    folder = tmp_path_factory.mktemp("peft")
    with zipfile.ZipFile(helpers.GOLDEN / "peft.zip") as archive:
        archive.extractall(folder)
    return folder


def trace(
    model, method, adapter, batches: np.ndarray, learning_rate: float = families.LEARNING_RATE
) -> list[float]:
    """The losses of a training as PEFT's was; nothing is computed twice, so the program is smaller."""
    model = dataclasses.replace(model, module=model.module.clone(remat=None))
    actor = policy(model, method)
    loss = losses.sft(actor)
    if method.penalty is not None:
        loss += losses.adapter_penalty(actor)
    tx = optax.adam(learning_rate)
    state, step = init(adapter, tx), make_step(tx)
    found = []
    for tokens in batches:
        weights = np.ones(tokens.shape, np.float32)
        weights[:, 0] = 0.0
        state, metrics = step(state, loss, {"tokens": tokens, "weights": weights / weights.sum()})
        found.append(float(metrics["loss"]))
    return found


@METHODS
def test_an_adapter_of_peft_computes_what_it_does_there(trained_by_peft, loaded, name):
    path, model = trained_by_peft / name, loaded(families.METHODS[name][0])
    golden = np.load(path / "golden.npz")
    method, adapter = load_adapter(path, model)
    found = model.with_params(method.attach(model.params, adapter)).logits(golden["tokens"])
    helpers.assert_close({"logits": found}, {"logits": golden["logits"]}, 1e-5)


@METHODS
def test_it_trains_as_it_does_there(trained_by_peft, loaded, name):
    path, model = trained_by_peft / name, loaded(families.METHODS[name][0])
    golden = np.load(path / "golden.npz")
    found = trace(model, *load_adapter(path, model), golden["batches"])
    np.testing.assert_allclose(found, golden["losses"], rtol=0, atol=1e-4)


@METHODS
def test_it_is_saved_with_the_tensors_that_peft_wrote(trained_by_peft, loaded, tmp_path, name):
    model = loaded(families.METHODS[name][0])
    save_adapter(tmp_path, model, *load_adapter(trained_by_peft / name, model))
    found, expected = (read(path) for path in (tmp_path, trained_by_peft / name))
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(found[tensor], value, err_msg=tensor)


def read(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path / "adapter_model.safetensors")


@METHODS
def test_what_trains_there_trains_here(trained_by_peft, loaded, name):
    """The file of an adapter holds what PEFT trains, and VeRA's projections, which it drew once."""
    model = loaded(families.METHODS[name][0])
    _, adapter = load_adapter(trained_by_peft / name, model)
    tensors = read(trained_by_peft / name)
    expected = sum(
        t.size for key, t in tensors.items() if "vera_A" not in key and "vera_B" not in key
    )
    assert tree.count(tree.trainable(adapter)) == expected


def test_pissa_trains_as_it_does_there_from_its_own_start(trained_by_peft, loaded):
    """Two decompositions give vectors of other signs, in which Adam's steps are the same."""
    model, method = loaded("llama_grouped"), pissa(rank=3, alpha=6.0)
    golden = np.load(trained_by_peft / "pissa" / "golden.npz")
    found = trace(model, method, method.init(jax.random.key(0), model.params), golden["batches"])
    np.testing.assert_allclose(found, golden["losses"], rtol=0, atol=1e-4)
