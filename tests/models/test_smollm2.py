"""SmolLM2 is the function that transformers computes: five real texts, in float32."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests import helpers
from trainjax.models import Model, load

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("optimised")]
GOLDEN = json.loads((helpers.GOLDEN / "smollm2_logits.json").read_text())


@pytest.fixture(scope="module")
def model() -> Model:
    return load(helpers.smollm2())


def row(name: str) -> np.ndarray:
    """The text padded to one length, so that all of them run the same program."""
    ids = GOLDEN["texts"][name]["ids"]
    return np.pad(np.asarray(ids, np.int32), (0, 96 - len(ids)))[None]


def test_logits_of_real_texts_are_those_of_transformers(model):
    """Golden numbers: `golden/make_smollm2_logits.py`."""
    if not (helpers.smollm2() / "model.gguf").is_file():
        pytest.skip("the numbers are of the GGUF weights; this model is the hub's")
    for name, text in GOLDEN["texts"].items():
        found = np.asarray(model.logits(row(name)), np.float64)[0][text["positions"]]
        entries = np.broadcast_to(GOLDEN["entries"], (len(found), len(GOLDEN["entries"])))
        chosen = np.take_along_axis(found, np.hstack([text["top"], entries]), axis=-1)
        np.testing.assert_allclose(chosen, text["logits"], rtol=0, atol=1e-3, err_msg=name)
        lse = np.logaddexp.reduce(found, axis=-1)
        np.testing.assert_allclose(lse, text["logsumexp"], rtol=0, atol=1e-3, err_msg=name)
        np.testing.assert_array_equal(found.argmax(-1), np.asarray(text["top"])[:, 0])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
def test_all_logits_are_those_of_transformers(model):
    import torch
    import transformers

    folder = helpers.smollm2()
    options = {"gguf_file": "model.gguf"} if (folder / "model.gguf").is_file() else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    for name, text in GOLDEN["texts"].items():
        with torch.no_grad():
            expected = theirs.eval()(torch.tensor([text["ids"]])).logits[0].numpy()
        found = model.logits(row(name))[0, : len(expected)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3, err_msg=name)
