"""`trainjax peft-table`: what it says is what an adapter holds and a file weighs, and no weights are read."""

import json
import struct

import jax
import optax
import pytest

from tests import toy
from trainjax import cli, models, tree
from trainjax.peft import lora
from trainjax.recipes import _common as common
from trainjax.recipes import peft_table
from trainjax.types import Frozen

LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


@pytest.fixture
def table(capsys):
    """Runs the job and returns what it printed."""

    def run(model, *flags):
        assert cli.main(["peft-table", "--model", str(model), *map(str, flags)]) == 0
        return capsys.readouterr().out

    return run


def folder(path, config):
    (path / "config.json").write_text(json.dumps(config))
    return path


def row(text, method="lora"):
    (found,) = (row for row in json.loads(text) if row["method"] == method)
    return found


def test_every_method_of_the_command_line_has_a_row(table, tmp_path):
    """Partial tuning has none where nobody says of what."""
    path = folder(tmp_path, LLAMA_70B)
    rows = [json.loads(table(path, "--json", *flags)) for flags in ([], ["--target", "mlp"])]
    names = [[row["method"] for row in found] for found in rows]
    assert names[0] == [name for name in peft_table.METHODS if name != "partial"]
    assert "partial" in names[1]
    assert set(common.PEFT) <= set(names[1])
    assert len(names[0]) >= 20


def test_the_numbers_are_those_of_a_real_adapter_and_its_file(table, model, tmp_path):
    loaded, method = models.load(model), lora(rank=4)
    adapter = method.init(jax.random.key(0), loaded.params)
    models.save_adapter(tmp_path / "a", loaded, method, adapter)
    data = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    count = tree.count(adapter)
    assert row(table(model, "--json", "--rank", 4)) == {
        "method": "lora",
        "trainable": count,
        "percent": 100 * count / tree.count(loaded.params),
        "optimizer_bytes": tree.num_bytes(optax.adamw(1.0).init(adapter)),
        "file_bytes": len(data) - 8 - header,
        "merges": True,
    }


def test_a_config_is_enough_whatever_the_models_size(table, tmp_path):
    """Llama 3.1 70B: 70.55e9 parameters; rank (in + out) for each of a layer's seven matrices."""
    found = row(table(folder(tmp_path, LLAMA_70B), "--json", "--rank", 16))
    sides = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192)]
    sides += [(8192, 28672), (8192, 28672), (28672, 8192)]
    assert found["trainable"] == 80 * 16 * sum(map(sum, sides))
    assert found["percent"] == pytest.approx(100 * found["trainable"] / 70_553_706_496)


def test_rank_and_target_reach_the_method(table, model):
    wide, narrow = (row(table(model, "--json", "--rank", rank))["trainable"] for rank in (8, 4))
    assert wide == 2 * narrow
    assert row(table(model, "--json", "--rank", 4, "--target", "query"))["trainable"] < narrow


def test_what_does_not_train_is_in_the_file_alone_and_what_cannot_merge_says_so(
    table, model, monkeypatch
):
    def half(scale: float = 1.0):
        def init(key, params):
            made = lora(rank=4).init(key, params)
            frozen = {"kept": Frozen(jax.numpy.zeros((7, 3)))}
            return made | frozen

        def merge(params, adapter):
            raise ValueError("it has no weights")

        def export(adapter, modules):
            files = lora().export({k: v for k, v in adapter.items() if k != "kept"}, modules)
            return files._replace(tensors=files.tensors | {"kept": adapter["kept"].value})

        return lora()._replace(init=init, merge=merge, export=export)

    monkeypatch.setattr(peft_table, "METHODS", {"lora": lora, "half": half})
    text = table(model, "--json", "--rank", 4)
    plain, found = row(text), row(text, "half")
    assert found["file_bytes"] == plain["file_bytes"] + 4 * 21
    assert found == plain | {"method": "half", "file_bytes": found["file_bytes"], "merges": False}


def test_a_network_that_only_makes_the_tokens_is_in_no_file(table, model):
    rows = {row["method"]: row for row in json.loads(table(model, "--json"))}
    assert rows["p_tuning"]["file_bytes"] == rows["prompt"]["file_bytes"]
    assert rows["prefix, projected"]["file_bytes"] == rows["prefix"]["file_bytes"]
    assert rows["prefix, projected"]["trainable"] > rows["prefix"]["trainable"]


def test_the_table_and_markdown_say_the_same(table, model):
    plain = [line.split() for line in table(model, "--rank", 4).splitlines()]
    marked = [
        line.strip("| ").split(" | ")
        for line in table(model, "--rank", 4, "--markdown").splitlines()
    ]
    assert marked[1] == ["---", "---:", "---:", "---:", "---:", "---"]
    assert [" ".join(cells).split() for cells in [marked[0], *marked[2:]]] == plain[1:]


def test_smollm2(table, tmp_path):
    """SmolLM2-135M has 134,515,008 parameters; the sides of a layer's matrices sum to 10,176."""
    config = LLAMA_70B | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
    title, _, line = table(folder(tmp_path, config), "--rank", 16).splitlines()[:3]
    assert title.endswith("134,515,008 parameters")
    assert line.split()[:3] == ["lora", f"{30 * 16 * 10176:,}", "3.63"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rank", "0"], "rank=0 for layers/"),
        (["--target", "nothing"], "no parameter's name matches 'nothing'"),
        (["--json", "--markdown"], "--json and --markdown are two ways to print the table"),
    ],
    ids=str,
)
def test_errors_are_one_sentence(model, capsys, flags, sentence):
    assert cli.main(["peft-table", "--model", str(model), *flags]) == 1
    assert sentence in capsys.readouterr().err


def test_a_family_that_is_not_known_is_named(tmp_path, capsys):
    config = toy.CONFIG | {"model_type": "gpt9"}
    assert cli.main(["peft-table", "--model", str(folder(tmp_path, config))]) == 1
    assert "model_type='gpt9' is not supported" in capsys.readouterr().err
