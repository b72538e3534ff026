"""What a run's folder says of the run, to Weights & Biases too, and what the terminal says meanwhile."""

import contextlib
import dataclasses
import json
from pathlib import Path

from trainjax.recipes import _run_folder as folder
from trainjax.recipes import sft
from trainjax.train import metrics

CONFIG = sft.Config(model="m", data="d", out=Path("o"), wandb="project", batch_size=3)


def test_wandb_gets_the_settings_and_a_resumed_run_its_first_id(tmp_path, monkeypatch):
    began = []

    @contextlib.contextmanager
    def wandb(**settings):
        began.append(settings)
        yield lambda record: None

    monkeypatch.setattr(metrics, "wandb", wandb)
    config = dataclasses.replace(CONFIG, out=tmp_path)
    for _ in range(2):
        folder.write(config)
        with folder.sinks(config, 1, 0):
            pass
    first, second = began
    assert first["config"]["batch_size"] == 3
    assert first["config"]["out"] == str(tmp_path)
    assert first["id"] == second["id"] == json.loads((tmp_path / "run.json").read_text())[0]["id"]
    assert first["resume"] == "allow"


def test_what_a_run_does_between_records_is_said_and_not_recorded(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, out=tmp_path, wandb=None)
    with folder.sinks(config, 1, 0) as told:
        for sink in told.sinks:
            sink({"step": 1, "loss": 2.0})
        assert told.said("evaluating", lambda x: x + 1)(1) == 2
    assert "evaluating ..." in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert "done, loss 2.0000; the adapter is in" in folder.summary(config, told.last, "generate")
