"""Whole models, from files to files."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import helpers, toy
from trainjax import merging, models
from trainjax.io import folder as folders
from trainjax.merging import merge_models, merge_tensor

METHODS = {
    "linear": merging.linear([1.0, 0.5]),
    "ties": merging.ties([1.0, 0.5], 0.4),
    "dare_ties": merging.dare_ties([1.0, 0.5], 0.4),
    "slerp": merging.slerp(0.3),
    "timber": merging.timber(),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Folders of a base and of two models."""
    path = tmp_path_factory.mktemp("models")
    model = models.random_model(toy.CONFIG, jax.random.key(0), tokenizer=toy.tokenizer())
    folders = [path / name for name in ("base", "one", "two")]
    for seed, folder in enumerate(folders):
        params = helpers.randomised(model.params, std=0.02, seed=seed)
        models.save_model(folder, model.with_params(params))
    return folders


@pytest.fixture
def copies(three, tmp_path):
    """The same, to be changed."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in three]


def tensors(folder):
    return load_file(folder / "model.safetensors")


def with_tensors(folder, change):
    found = tensors(folder)
    change(found)
    save_file(found, folder / "model.safetensors")


def with_json(folder, name="config.json", **changes):
    file = folder / name
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | changes))


def stored_as(folder, dtype):
    with_tensors(folder, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))


def run(out, method, three, **options):
    base, *others = three
    models = others[: method.most or 2]
    merge_models(out, method, models, base if method.needs_base else None, **options)
    return out


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_tensor_is_merged_by_the_method(three, tmp_path, method):
    found = tensors(run(tmp_path / "out", method, three, block=500))
    base, *models = map(tensors, three)
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        start = base[name] if method.needs_base else None
        mine = [model[name] for model in models[: method.most or 2]]
        expected = merge_tensor(method, start, mine, name)
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-6, err_msg=name)


def test_the_folder_loads_here(three, tmp_path):
    out = run(tmp_path / "out", METHODS["ties"], three)
    model = models.load(out)
    assert model.tokenizer.encode("hello") == toy.tokenizer().encode("hello")
    assert np.isfinite(model.logits(np.arange(12).reshape(1, 12))).all()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_folder_loads_in_transformers_as_the_same_function(three, tmp_path):
    import torch
    import transformers

    out = run(tmp_path / "out", METHODS["ties"], three)
    tokens = np.arange(12).reshape(1, 12)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(models.load(out).logits(tokens), expected, rtol=0, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == toy.CHATML


def test_tensors_are_stored_as_in_the_base_or_as_told(copies, tmp_path):
    base, *_ = copies
    stored_as(base, ml_dtypes.bfloat16)
    with_tensors(
        base, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.float32)})
    )
    out = run(tmp_path / "same", METHODS["ties"], copies)
    kinds = {name: tensor.dtype for name, tensor in tensors(out).items()}
    assert kinds.pop("model.norm.weight") == np.float32
    assert set(kinds.values()) == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    other = run(tmp_path / "other", METHODS["ties"], copies, dtype=jnp.float32)
    assert {tensor.dtype for tensor in tensors(other).values()} == {np.dtype(np.float32)}
    expected = {
        name: tensor.astype(kinds.get(name, np.float32)) for name, tensor in tensors(other).items()
    }
    for name, tensor in tensors(out).items():
        np.testing.assert_array_equal(tensor, expected[name])


def test_the_sizes_of_blocks_do_not_change_the_result(copies, tmp_path):
    """One of a row, also where a row is larger, and one of the whole tensor."""
    kept = ("embed_tokens", "1.self_attn.k_proj", "1.mlp.down_proj", "model.norm")

    def few(tensors):
        for name in list(tensors):
            if not any(part in name for part in kept):
                del tensors[name]
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:9].copy()

    for folder in copies:
        with_tensors(folder, few)
    for name in ("ties", "dare_ties"):
        one, two = (
            run(tmp_path / f"{name}{block}", METHODS[name], copies, block=block)
            for block in (32, 10**6)
        )
        assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_parts_are_written_into_shards_as_they_come(tmp_path):
    content = {f"t{i}": np.arange(i, i + 12).reshape(4, 3).astype(np.float32) for i in range(5)}
    kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in content.items()}
    folders.stream_shards(tmp_path, kinds, lambda name: iter(np.split(content[name], 2)), 100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 48}
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / file)[name], content[name])


class TestTokenizer:
    def test_it_comes_from_the_first_with_a_chat_template(self, copies, tmp_path):
        base, _, two = copies
        for folder in copies[:2]:
            (folder / "chat_template.jinja").unlink()
        with_json(two, "generation_config.json", temperature=0.7)
        with_json(two, eos_token_id=2)
        out = run(tmp_path / "out", METHODS["ties"], copies)
        assert (out / "chat_template.jinja").read_text() == toy.CHATML
        assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.7}
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2
        named = run(tmp_path / "named", METHODS["ties"], copies, tokenizer=base)
        assert not (named / "chat_template.jinja").exists()
        assert not (named / "generation_config.json").exists()

    @pytest.mark.parametrize(
        ("method", "speaker"), [(merging.timber(), 1), (merging.instruction_residual(), 2)]
    )
    def test_it_comes_from_the_instruct_model_where_there_is_one(
        self, copies, tmp_path, method, speaker
    ):
        for number, folder in enumerate(copies):
            with_json(folder, eos_token_id=number)
        out = run(tmp_path / "out", method, copies)
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == speaker

    def test_one_that_is_not_of_the_merged_models_is_refused(self, three, tmp_path):
        with pytest.raises(ValueError, match="tokenizer='other' is none of the merged models "):
            run(tmp_path / "out", METHODS["ties"], three, tokenizer="other")

    def test_ids_that_are_different_tokens_are_refused_unless_meant(self, copies, tmp_path):
        file = copies[2] / "tokenizer.json"
        content = json.loads(file.read_text())
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        file.write_text(json.dumps(content))
        first = min(vocab["a"], vocab["b"])
        with pytest.raises(ValueError, match=f"token {first} is '[ab]' to the tokenizer of .*base"):
            run(tmp_path / "out", METHODS["ties"], copies)
        run(tmp_path / "out", METHODS["ties"], copies, other_tokenizer=True)

    def test_a_model_without_one_is_merged(self, copies, tmp_path):
        for folder in copies:
            for file in folder.glob("*token*"):
                file.unlink()
            (folder / "chat_template.jinja").unlink()
        out = run(tmp_path / "out", METHODS["ties"], copies)
        assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]


# --- what does not fit --------------------------------------------------------------------------

NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda folder: with_json(folder, model_type="mistral"),
            "two has model_type='mistral', .*base has 'llama': only models of one architecture",
        ),
        (
            lambda folder: with_json(folder, num_attention_heads=2),
            "two has num_attention_heads=2, .*base has 4",
        ),
        (
            lambda folder: with_tensors(folder, lambda t: t.pop(UP)),
            f"two has no tensor '{UP}', which .*base has",
        ),
        (
            lambda folder: with_tensors(folder, lambda t: t.update({"extra": t[NORM]})),
            "base has no tensor 'extra', which .*two has",
        ),
        (
            lambda folder: with_tensors(folder, lambda t: t.update({UP: t[UP][:-1]})),
            rf"{UP} is \(63, 32\) in .*two and \(64, 32\) in .*base",
        ),
        (
            lambda folder: with_tensors(folder, lambda t: t[UP].__setitem__((5, 3), np.nan)),
            f"{UP} of .*two holds NaN or infinite numbers",
        ),
        (
            lambda folder: with_tensors(folder, lambda t: t[NORM].__setitem__(3, np.inf)),
            f"{NORM} of .*two holds NaN or infinite numbers",
        ),
        (
            lambda folder: with_tensors(folder, lambda t: t.update({UP: t[UP].astype(np.int8)})),
            f"{UP} of .*two is int8; only floats can be merged",
        ),
        (
            lambda folder: with_json(folder, quantization_config={"quant_method": "gptq"}),
            "the weights of .*two are quantised",
        ),
    ],
    ids=["family", "heads", "missing", "unknown", "shape", "nan", "inf", "integers", "quantised"],
)
def test_a_model_that_does_not_fit_is_named_and_nothing_is_left(copies, tmp_path, spoil, sentence):
    spoil(copies[2])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path / "out", METHODS["ties"], copies)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_result_that_the_dtype_cannot_hold_is_named(copies, tmp_path):
    stored_as(copies[0], np.float16)
    with pytest.raises(ValueError, match=r"the merged model\..* too large for float16"):
        run(tmp_path / "out", merging.task_arithmetic([1e7, 1.0]), copies)


def test_a_scalar_is_merged(copies, tmp_path):
    for number, folder in enumerate(copies):
        with_tensors(folder, lambda t, n=number: t.update({"gate": np.array(n, np.float32)}))
    found = tensors(run(tmp_path / "out", merging.task_arithmetic([1.0, 0.25]), copies))["gate"]
    assert (found.shape, float(found)) == ((), 1.5)


def test_a_tied_head_that_was_stored_is_passed_over(copies, tmp_path):
    embedding = tensors(copies[2])["model.embed_tokens.weight"]
    with_tensors(copies[2], lambda t: t.update({"lm_head.weight": embedding.copy()}))
    assert "lm_head.weight" not in tensors(run(tmp_path / "out", METHODS["ties"], copies))


@pytest.mark.parametrize(
    ("method", "count", "has_base", "sentence"),
    [
        (merging.ties([1.0, 1.0], 0.5), 2, False, "this method needs the base"),
        (merging.linear([1.0, 1.0]), 2, True, "this method has no base"),
        (merging.ties([1.0, 1.0], 0.5), 1, True, "as it is set, merges 2 models, not 1"),
        (merging.model_stock(), 1, True, "as it is set, merges 2 models or more, not 1"),
        (merging.timber(), 2, True, "as it is set, merges 1 model, not 2"),
    ],
)
def test_a_wrong_number_of_models_is_refused(three, tmp_path, method, count, has_base, sentence):
    base, *others = three
    with pytest.raises(ValueError, match=sentence):
        merge_models(tmp_path / "out", method, others[:count], base if has_base else None)


def test_a_folder_that_holds_something_is_not_written_over(three, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} exists already"):
        run(tmp_path, METHODS["ties"], three)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_write_that_fails_leaves_nothing_behind(three, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "out", METHODS["ties"], three)
    assert not list(tmp_path.iterdir())
