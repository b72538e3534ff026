"""A model is what its files say: its own head, the tokens that end an answer, ids that it has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import toy
from trainjax.io.folder import HfFolder
from trainjax.merging import linear, merge_models
from trainjax.models import llama, load, save_gguf, save_model
from trainjax.models._model import check_tokenizer

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = np.asarray([[1, 7, 5, 30]])


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    """A copy of a folder whose config ties the head, to be changed."""
    return Path(shutil.copytree(golden / "llama_tied", tmp_path / "model"))


def with_head(folder: Path, change) -> np.ndarray:
    """The folder gets a head; returns it."""
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = change(tensors[EMBEDDING])
    save_file(tensors, folder / "model.safetensors")
    return tensors[HEAD]


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_an_equal_copy_of_a_tied_head_is_left_out_silently(folder, caplog):
    expected = load(folder).logits(TOKENS)
    with_head(folder, np.copy)
    model = load(folder)
    assert "head" not in model.params
    assert not caplog.messages
    np.testing.assert_array_equal(model.logits(TOKENS), expected)


def test_another_head_than_the_embedding_is_used_in_spite_of_the_config(folder, caplog):
    """Twice the embedding, so twice the logits."""
    expected = 2 * load(folder).logits(TOKENS)
    with_head(folder, lambda embedding: 2 * embedding)
    model = load(folder)
    np.testing.assert_allclose(model.logits(TOKENS), expected, rtol=0, atol=1e-5)
    (warning,) = caplog.messages
    assert "ties the output head to the embedding, but lm_head.weight has other numbers" in warning


def test_a_head_of_its_own_goes_along_on_every_way_out(folder, tmp_path):
    head = with_head(folder, lambda embedding: embedding[::-1].copy())
    model = load(folder)
    save_model(tmp_path / "saved", model)
    merge_models(tmp_path / "merged", linear([0.5, 0.5]), [folder, folder])
    save_gguf(tmp_path / "model.gguf", model)
    for out in ("saved", "merged"):
        np.testing.assert_array_equal(load_file(tmp_path / out / "model.safetensors")[HEAD], head)
        assert config_of(tmp_path / out)["tie_word_embeddings"] is False
    found = load(tmp_path / "model.gguf", dtype=jnp.float32).params["head"]["kernel"]
    np.testing.assert_allclose(found, head.T, rtol=1e-3)


def test_generation_settings_are_read_and_written_back(folder, tmp_path):
    settings = {"eos_token_id": [0, 2], "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = load(folder)
    assert model.generation == settings
    save_model(tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == settings


def test_a_model_without_generation_settings_gets_none(folder, tmp_path):
    save_model(tmp_path / "out", load(folder))
    assert HfFolder(tmp_path / "out").generation() == {}
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("token", [-1, 48])
def test_logits_of_a_token_beyond_the_vocabulary_are_refused(loaded, token):
    with pytest.raises(ValueError, match=f"token {token} is not in the vocabulary: .* 0 to 47"):
        loaded("llama_tied").logits(np.asarray([[1, token]]))


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_told(caplog):
    config = llama.config(toy.CONFIG | {"vocab_size": 257})
    check_tokenizer("toy", config, toy.tokenizer())
    assert "tokenizer of toy has 259 tokens and the embedding 257 rows" in caplog.text
