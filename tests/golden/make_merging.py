"""Makes merging.json: mergekit's merges of the random tensors of tests/tensors.py.

    pip install mergekit==0.1.5 torch==2.13.0
    PYTHONPATH=. python tests/golden/make_merging.py

mergekit's own settings are kept where it has ones (TIES normalises by weight, task arithmetic does not).
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup

from tests.tensors import GOLDEN_CASES, base_and_models

NAMES = {"weights": "weight", "scale": "lambda"}


def merged(method: str, seed: int, settings: dict[str, Any]) -> list[float]:
    """The tensor, flat; `linear` has no base, and `slerp` goes from the first model to the second."""
    base, models = base_and_models(seed)
    tensors = {"linear": models, "slerp": models[:2]}.get(method, [base, *models])
    start = None if method == "linear" else 0
    group = TensorGroup.from_tensors(list(map(torch.from_numpy, tensors)), base_index=start)
    ids = [entry.id for entry in group.entries if not entry.is_base]
    options = {NAMES.get(name, name): value for name, value in settings.items()}
    for name in ("weight", "density"):
        if name in options:
            value = options[name]
            each = value if isinstance(value, list) else [value] * len(ids)
            options[name] = dict(zip(ids, each, strict=True))
    (result,) = registry.get(method)([group], parameters=options)
    return [float(f"{number:.8g}") for number in result.reshape(-1).tolist()]


def main() -> None:
    """Writes the file."""
    packages = ("mergekit", "torch", "numpy")
    golden = {
        "made_with": {name: importlib.metadata.version(name) for name in packages},
        "values": {
            method: [[merged(method, seed, settings) for seed in range(4)] for settings in cases]
            for method, cases in GOLDEN_CASES.items()
        },
    }
    path = Path(__file__).parent / "merging.json"
    path.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
