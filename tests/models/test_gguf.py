"""Models as GGUF files: the same numbers here again, and the same function in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFReader

from tests import helpers
from trainjax import parallel, tree
from trainjax.io import gguf_write
from trainjax.models import Model, load, save_gguf
from trainjax.peft import lora
from trainjax.rollout import generate, prompt_ids

MODELS = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biased llama3": {
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 32,  # two frequencies must lie between for the reader to find the numbers
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "wide heads": {"head_dim": 16},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2"},
}
TOKENS = np.random.default_rng(0).integers(0, 61, (1, 24), np.int32)


def tiny(name: str) -> Model:
    """With params on the host."""
    model = helpers.tiny.__wrapped__(**MODELS[name])  # settings of dicts cannot be remembered
    return model.with_params(jax.device_get(model.params))


def same(found: Model, expected: Model) -> bool:
    ours, theirs = (tree.flatten(model.params) for model in (found, expected))
    assert ours.keys() == theirs.keys()
    return all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["biased llama3", "tied", "qwen2"])
def test_a_saved_model_comes_back_bit_by_bit(tmp_path, name):
    model = tiny(name)
    save_gguf(tmp_path / "m.gguf", model, kind=gguf_write.F32)
    assert same(load(tmp_path / "m.gguf"), model)


def test_a_model_over_a_mesh_is_saved_whole(tmp_path):
    model = helpers.tiny()
    spread = model.with_params(parallel.place(model.params, helpers.mesh_of(1, 2, 2)))
    save_gguf(tmp_path / "one.gguf", model)
    save_gguf(tmp_path / "many.gguf", spread)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_an_adapter_goes_in_merged_and_not_attached(tmp_path):
    model, method = helpers.tiny(), lora(rank=2)
    adapter = helpers.trained(method, model.params)
    merged = method.merge(model.params, adapter)
    save_gguf(tmp_path / "m.gguf", model, merged, gguf_write.F32)
    assert same(load(tmp_path / "m.gguf"), model.with_params(merged))
    with pytest.raises(ValueError, match="is a Lora, not an array; merge the adapter first"):
        save_gguf(tmp_path / "n.gguf", model, method.attach(model.params, adapter))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_bfloat16_params_are_saved_as_they_are(tmp_path):
    model = helpers.tiny()
    half = jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16), model.params)
    half = model.with_params(half)
    save_gguf(tmp_path / "m.gguf", half, kind=gguf_write.BF16)
    assert same(load(tmp_path / "m.gguf", dtype=jnp.bfloat16), half)


# --- llama.cpp itself: `pip install llama-cpp-python`, which compiles it --------------------------


@pytest.fixture
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def opened(llama_cpp, path: Path):
    return llama_cpp.Llama(
        str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, flash_attn=False
    )


def logits(llama, tokens: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)], np.float32)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_function_that_was_saved(tmp_path, llama_cpp, name):
    """Its cache holds keys and values in float16, so logits agree to about three digits."""
    model = tiny(name)
    save_gguf(tmp_path / "m.gguf", model, kind=gguf_write.F32)
    found = logits(opened(llama_cpp, tmp_path / "m.gguf"), TOKENS[0].tolist())
    helpers.assert_close({"logits": found}, {"logits": model.logits(TOKENS)[0]}, 4e-3)


QUESTIONS = [
    "What is the capital of Peru?",
    "Write a haiku about rain.",
    "I've 12345  apples\n\nand you?",
]


@pytest.mark.parity
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("optimised_here")
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_llama_cpp_answers_as_we_do(tmp_path, llama_cpp, kind):
    """Greedily, 48 tokens of three answers; the prompts' ids are its own tokenizer's too."""
    model = load(helpers.smollm2())
    save_gguf(tmp_path / "m.gguf", model, kind=getattr(gguf_write, kind))
    llama = opened(llama_cpp, tmp_path / "m.gguf")
    prompts = [prompt_ids(model.tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]
    ours = generate(load(tmp_path / "m.gguf"), prompts, max_new_tokens=48)
    for prompt, answer in zip(prompts, ours, strict=True):
        text = model.tokenizer.decode(prompt)
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == prompt
        theirs = []
        for token in llama.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
            theirs.append(token)
            if token == llama.token_eos() or len(theirs) == 48:
                break
        assert theirs == list(answer.tokens)


@pytest.mark.parity
@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
def test_q8_0_is_bit_by_bit_what_llama_cpp_quantises_to(tmp_path, llama_cpp):
    import ctypes

    model = load(helpers.smollm2())
    for kind in (gguf_write.F32, gguf_write.Q8_0):
        save_gguf(tmp_path / f"{kind.name}.gguf", model, kind=kind)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = 7  # LLAMA_FTYPE_MOSTLY_Q8_0
    source, target = (str(tmp_path / name).encode() for name in ("F32.gguf", "theirs.gguf"))
    assert llama_cpp.llama_model_quantize(source, target, ctypes.byref(settings)) == 0
    ours, theirs = (
        {tensor.name: tensor for tensor in GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("Q8_0", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(ours[name].data, tensor.data, name)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("optimised_here")
@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 0.0), ("F16", 0.002), ("Q8_0", 0.06)])
def test_smollm2_is_the_same_function_within_what_the_type_rounds(tmp_path, kind, tolerance):
    golden = json.loads((helpers.GOLDEN / "smollm2_logits.json").read_text())["texts"]
    model = load(helpers.smollm2())
    save_gguf(tmp_path / "m.gguf", model, kind=getattr(gguf_write, kind))
    again = load(tmp_path / "m.gguf", dtype=jnp.float32)
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    ids = np.asarray([next(iter(golden.values()))["ids"]], np.int32)
    found, expected = (np.asarray(one.logits(ids), np.float64) for one in (again, model))
    # Measured 0.0011 for F16; 0.041 for Q8_0, which is llama.cpp's own rounding, see above.
    assert np.sqrt(np.mean((found - expected) ** 2)) <= tolerance * expected.std()
