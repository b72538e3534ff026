"""`trainjax export`: what transformers, llama.cpp and PEFT take, and one sentence where they would not."""

import json
import logging
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers, toy
from trainjax import cli, models, tree
from trainjax.io import peft as files
from trainjax.io.gguf import GgufFile
from trainjax.io.gguf_tokenizer import to_gguf
from trainjax.peft import lora


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the toy model whose tokenizer has a merge: llama.cpp has no BPE without."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = toy.tokenizer()
    state = json.loads(made.backend_tokenizer.to_str())
    state["model"]["vocab"]["he"] = 259
    state["model"]["merges"] = [["h", "e"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=toy.CHATML,
    )
    model = helpers.tiny(vocab_size=260, tie_word_embeddings=True)
    path = tmp_path_factory.mktemp("models") / "toy"
    models.save_model(path, model.with_params(model.params))
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A trained adapter's folder."""
    model, method = models.load(base), lora(rank=3)
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    models.save_adapter(path, model, method, helpers.trained(method, model.params))
    return path


@pytest.fixture
def export(base, tmp_path, capsys):
    """Runs the job into `tmp_path / out`; the exit status and what was said."""

    def run(to, *flags, out="out", model=base):
        args = ["--model", model, "--to", to, "--out", tmp_path / out, *flags]
        status = cli.main(["export", *map(str, args)])
        return status, capsys.readouterr()

    return run


def same(found, expected, tolerance=0.0):
    ours, theirs = (tree.flatten(params) for params in (found, expected))
    helpers.assert_close(ours, theirs, tolerance)


def merged(base, adapter):
    model = models.load(base)
    method, factors = models.load_adapter(adapter, model)
    return method.merge(model.params, factors)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "f32", "bf16"])
def test_a_gguf_file_holds_the_model_and_its_tokenizer(export, base, tmp_path, kind):
    assert export("gguf", "--type", kind, out="m.gguf")[0] == 0
    found, expected = models.load(tmp_path / "m.gguf"), models.load(base)
    tolerance = {"f32": 0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 1 / 127}[kind]
    same(tree.cast(found.params, np.float32), expected.params, tolerance)
    assert to_gguf(found.tokenizer, 260) == to_gguf(expected.tokenizer, 260)
    assert found.tokenizer.encode("the <|im_start|>hehe") == expected.tokenizer.encode(
        "the <|im_start|>hehe"
    )


def test_a_gguf_file_is_float16_by_default(export, tmp_path):
    status, said = export("gguf", out="m.gguf")
    assert (status, said.out) == (0, f"{tmp_path / 'm.gguf'}\n")
    assert GgufFile(tmp_path / "m.gguf").read("model.embed_tokens.weight").dtype == np.float16


def test_an_adapter_is_merged_into_the_gguf_file(export, base, adapter, tmp_path):
    assert export("gguf", "--adapter", adapter, "--type", "f32", out="m.gguf")[0] == 0
    same(models.load(tmp_path / "m.gguf").params, merged(base, adapter))


def test_a_folder_for_transformers_has_the_adapter_merged(export, base, adapter, tmp_path):
    assert export("hf", "--adapter", adapter)[0] == 0
    same(models.load(tmp_path / "out").params, merged(base, adapter))
    assert export("hf", out="plain")[0] == 0
    same(models.load(tmp_path / "plain").params, models.load(base).params)


def test_a_gguf_file_becomes_a_folder_again(export, base, tmp_path):
    assert export("gguf", "--type", "f32", out="m.gguf")[0] == 0
    assert export("hf", model=tmp_path / "m.gguf")[0] == 0
    same(models.load(tmp_path / "out").params, models.load(base).params)


def test_dtype_is_of_the_weights_that_are_written(export, tmp_path):
    assert export("hf", "--dtype", "bfloat16")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_is_written_as_peft_has_it(export, base, adapter, tmp_path):
    status, said = export("peft", "--adapter", adapter)
    assert (status, said.out) == (0, f"{tmp_path / 'out'}\n")
    found, original = (files.read(path)[0] for path in (tmp_path / "out", adapter))
    assert found.fields == original.fields
    helpers.assert_close(found.tensors, original.tensors, 0.0)
    assert "--enable-lora --max-lora-rank 8 --lora-modules out=" in said.err


def test_a_runs_folder_stands_for_its_adapter(export, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    assert export("peft", "--adapter", tmp_path / "run")[0] == 0
    assert files.read(tmp_path / "out")[0].fields == files.read(adapter)[0].fields


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "flags", "sentence"),
    [
        ("gguf", [], "out: --to gguf writes one file, whose name ends in .gguf"),
        ("hf", ["--type", "f16"], "--type is of the matrices in a gguf file; give --dtype with"),
        ("peft", [], "--to peft writes an adapter: name it with --adapter"),
        ("peft", ["--dtype", "bfloat16"], "an adapter is written in float32"),
        ("peft", ["--adapter", "nowhere"], "nowhere is not an adapter's folder"),
        ("hf", ["--adapter", "nowhere"], "nowhere is not an adapter's folder"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_done_is_one_sentence(export, tmp_path, to, flags, sentence):
    status, said = export(to, *flags)
    assert (status, said.out) == (1, "")
    assert said.err.startswith("error: ")
    assert sentence in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["onnx", "--type"])
def test_an_unknown_target_or_type_lists_those_there_are(export, to):
    args = ["onnx"] if to == "onnx" else ["gguf", "--type", "q4_0"]
    status, said = export(*args)
    assert status == 2
    assert ("--to is one of hf, gguf, peft" if to == "onnx" else "one of f16, q8_0") in said.err


@pytest.mark.parametrize("to", ["hf", "gguf", "peft"])
def test_an_adapter_of_another_base_is_refused(export, base, adapter, tmp_path, to):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    model = models.load(base)
    shutil.rmtree(other)
    models.save_model(other, model, helpers.randomised(model.params, seed=1))
    shutil.copy(base / "tokenizer.json", other)
    out = "m.gguf" if to == "gguf" else "out"
    status, said = export(to, "--adapter", adapter, model=other, out=out)
    assert status == 1
    assert "was trained on another base" in said.err
    assert not (tmp_path / out).exists()
    assert export(to, "--adapter", adapter, "--other-base", model=other, out=out)[0] == 0


@pytest.mark.parametrize("to", ["hf", "gguf", "peft"])
def test_what_exists_is_not_written_over(export, adapter, tmp_path, to):
    (tmp_path / "out.gguf").write_text("mine")
    status, said = export(to, "--adapter", adapter, out="out.gguf")
    assert status == 1
    assert "out.gguf exists already; give the name of a new folder or file" in said.err
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_an_adapter_of_a_method_of_our_own_is_no_adapter_of_pefts(export, adapter, tmp_path):
    ours = shutil.copytree(adapter, tmp_path / "ours")
    fields = {"peft_type": "TRAINJAX", "trainjax_method": "ours"}
    (ours / "adapter_config.json").write_text(json.dumps(fields))
    status, said = export("peft", "--adapter", ours)
    assert status == 1
    assert "is of ours, which the PEFT library does not have" in said.err


# --- reward models ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward(base, tmp_path_factory):
    """The adapter of a reward model, and the folder of one that has none."""
    model, method = models.load(base), lora(rank=2)
    path = tmp_path_factory.mktemp("reward")
    head = {"kernel": jnp.ones((32, 1))}
    params = {"body": helpers.trained(method, model.params), "score": head}
    models.save_scorer(path / "adapter", model, method, params)
    assert (
        cli.main(
            [
                "export",
                "--model",
                str(base),
                "--adapter",
                str(path / "adapter"),
                "--to",
                "hf",
                "--out",
                str(path / "folder"),
            ]
        )
        == 0
    )
    return path


@pytest.mark.parametrize("alone", [True, False])
def test_a_reward_model_has_no_gguf_file(export, base, reward, tmp_path, alone):
    args = {"model": reward / "folder"} if alone else {}
    flags = [] if alone else ["--adapter", reward / "adapter"]
    status, said = export("gguf", *flags, out="m.gguf", **args)
    assert status == 1
    assert "a reward model scores texts, which a gguf file has no place for" in said.err
    assert not (tmp_path / "m.gguf").exists()


def test_a_reward_model_and_its_adapter_are_written_as_they_are(export, reward, tmp_path):
    assert export("hf", model=reward / "folder", out="again")[0] == 0
    same(models.load_scorer(tmp_path / "again")[2], models.load_scorer(reward / "folder")[2])
    assert export("peft", "--adapter", reward / "adapter")[0] == 0
    found, original = (files.read(path)[0] for path in (tmp_path / "out", reward / "adapter"))
    helpers.assert_close(found.tensors, original.tensors, 0.0)


# --- vLLM ---------------------------------------------------------------------------------------

PLAIN = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none", "modules_to_save": None}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"use_rslora": True, "r": 512}, ""),
        ({"r": 513}, "its rank 513 is above 512"),
        ({"rank_pattern": {"q_proj": 600}}, "its rank 600 is above 512"),
        ({"alpha_pattern": {"q_proj": 2}}, "its ranks or scales differ by module"),
        ({"use_dora": True}, "it is of DoRA"),
        ({"modules_to_save": ["lm_head"]}, "it saves whole modules (['lm_head'])"),
        ({"bias": "all"}, "it trains biases (bias='all')"),
        ({"peft_type": "IA3"}, "its peft_type is IA3, and vLLM loads LORA"),
        ({"use_dora": True, "bias": "all"}, "it is of DoRA (use_dora); it trains biases"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_vllm_refuses_what_it_cannot_serve(fields, reason):
    found = files.vllm_refuses(PLAIN | fields)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(("rank", "fits"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_the_rank_that_vllm_must_be_started_with(rank, fits):
    assert files.vllm_rank(PLAIN | {"r": rank}) == fits


def test_saving_an_adapter_that_vllm_refuses_warns(base, tmp_path, caplog):
    model = models.load(base)
    for patterns, warned in ({}, False), ({"query": 1}, True):
        method = lora(rank=2, rank_pattern=patterns)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            models.save_adapter(
                tmp_path / str(warned), model, method, helpers.trained(method, model.params)
            )
        assert ("vLLM would not serve the adapter: its ranks" in caplog.text) == warned
