"""Makes llama.zip and rope_frequencies.json: tiny models and adapters as transformers and PEFT write
and compute them.

    pip install '.[parity]'
    PYTHONPATH=. python tests/golden/make_llama.py

llama.zip holds a folder a model (`config.json`, `model.safetensors`) with `golden.npz` in it (`tokens`,
and the `logits` in float32), and in some of them a folder an adapter, with a `golden.npz` of its own.
Every parameter is random and far from its initialisation, so each of them counts in the logits.
`about.json` has the versions. The models are those of `families.FAMILIES`, the adapters those of
`families.ADAPTERS`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests import families

HERE = Path(__file__).parent
ROPES = {
    "llama-3.1-8b": {
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-3.2-1b": {
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "linear": {
        "head_dim": 32,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    },
    "smollm2-135m": {
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
}


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "safetensors", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def rope_frequencies() -> dict:
    cases = {}
    for name, settings in ROPES.items():
        config = transformers.LlamaConfig(
            hidden_size=4 * settings["head_dim"],
            num_attention_heads=4,
            max_position_embeddings=131072,
            **settings,
        )
        cases[name] = {
            "head_dim": settings["head_dim"],
            "config": {"rope_parameters": settings["rope_parameters"]},
            "inv_freq": LlamaRotaryEmbedding(config).inv_freq.tolist(),
        }
    return {"command": "python tests/golden/make_llama.py", "versions": versions(), "cases": cases}


def save_golden(model, tokens: np.ndarray, folder: Path) -> None:
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long()).logits.float().numpy()
    np.savez(folder / "golden.npz", tokens=tokens, logits=logits)


def write(root: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 48, (2, 14)).astype(np.int32)
    for name in families.FAMILIES:
        model = families.torch_model(name)
        model.save_pretrained(root / name)
        save_golden(model, tokens, root / name)
        for adapter, (family, settings) in families.ADAPTERS.items():
            if family == name:
                wrapped = families.torch_adapter(families.torch_model(name), settings)
                wrapped.save_pretrained(root / name / adapter)
                save_golden(wrapped, tokens, root / name / adapter)
    (root / "about.json").write_text(json.dumps(versions(), indent=2))


def main() -> None:
    (HERE / "rope_frequencies.json").write_text(json.dumps(rope_frequencies(), indent=1) + "\n")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write(root)
        with zipfile.ZipFile(HERE / "llama.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(root.rglob("*")):
                if file.is_file() and file.name not in ("README.md", "generation_config.json"):
                    # A fixed date, so that equal contents make an equal file.
                    info = zipfile.ZipInfo(str(file.relative_to(root)), (2020, 1, 1, 0, 0, 0))
                    archive.writestr(info, file.read_bytes(), zipfile.ZIP_DEFLATED)
    print(peft.__version__, transformers.__version__, (HERE / "llama.zip").stat().st_size)


if __name__ == "__main__":
    main()
