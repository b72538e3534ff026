"""Makes peft.zip: adapters of each method that PEFT has, what they compute, and how they train.

    pip install '.[parity]'
    PYTHONPATH=. python tests/golden/make_peft.py

peft.zip holds a folder a method of `families.METHODS`, as PEFT saves it, over the models of llama.zip,
with `golden.npz` in it: `tokens` and the `logits` of the adapter in float32, the `batches` of a training
from that adapter and the `losses` of its steps (before each step; the first token of a row is no target).
Every number of an adapter has noise on it, so that none is at its start. `about.json` has the versions.
PEFT's pissa is trained from its own start, since that is what is particular to it.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from tests import families
from tests.golden.make_llama import versions

HERE = Path(__file__).parent


def wrapped(family: str, kind: str, settings: dict[str, Any]) -> Any:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
    torch.manual_seed(0)
    return peft.get_peft_model(families.torch_model(family), config)


def with_noise(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rng = np.random.default_rng([*name.encode()])
                noise = torch.from_numpy(0.2 * rng.standard_normal(parameter.shape)).float()
                parameter.copy_(parameter + noise)
    return model


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    labels = tokens.clone()
    labels[:, 0] = -100
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss


def trace(
    model: Any, batches: np.ndarray, learning_rate: float = families.LEARNING_RATE
) -> np.ndarray:
    """The losses of a training with AdamW without decay, each before its step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    losses = []
    model.train()
    for batch in batches:
        loss = loss_of(model, torch.from_numpy(batch).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.asarray(losses)


def write_case(folder: Path, model: Any) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 48, (2, 14)).astype(np.int32)
    batches = rng.integers(3, 48, (families.STEPS, 2, 14)).astype(np.int32)
    with torch.no_grad():
        model.eval()
        logits = model(torch.from_numpy(tokens).long()).logits.float().numpy()
    # Of prompts the first positions are the virtual tokens' own.
    logits = logits[:, -tokens.shape[1] :]
    losses = trace(model, batches)
    np.savez(folder / "golden.npz", tokens=tokens, logits=logits, batches=batches, losses=losses)


def write(root: Path) -> None:
    for name, (family, kind, settings) in families.METHODS.items():
        model = with_noise(wrapped(family, kind, settings))
        model.save_pretrained(root / name)
        write_case(root / name, model)
    pissa = {"r": 3, "lora_alpha": 6, "init_lora_weights": "pissa", "target_modules": families.ALL}
    (root / "pissa").mkdir()
    write_case(root / "pissa", wrapped("llama_grouped", "LoraConfig", pissa))
    (root / "about.json").write_text(json.dumps(versions(), indent=2))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write(root)
        with zipfile.ZipFile(HERE / "peft.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(root.rglob("*")):
                if file.is_file() and file.name != "README.md":
                    # A fixed date, so that equal contents make an equal file.
                    info = zipfile.ZipInfo(str(file.relative_to(root)), (2020, 1, 1, 0, 0, 0))
                    archive.writestr(info, file.read_bytes(), zipfile.ZIP_DEFLATED)
    print(peft.__version__, (HERE / "peft.zip").stat().st_size)


if __name__ == "__main__":
    main()
