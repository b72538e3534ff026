"""Makes smollm2_generation.json: 64 greedy tokens on ten prompts, by transformers in float32.

    pip install -e '.[test,parity]' && trainjax fetch smollm2-135m-instruct
    python tests/golden/make_smollm2_generation.py

The weights are those of the fetched file, dequantised here and handed over as a model folder; both
sides so have the same float32 numbers. transformers does the rest: its model, its cache, its generate.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path

PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three fruits that are red.",
    "Translate to French: Good morning, my friend.",
    "def fibonacci(n):",
    "What is 12 + 30?",
    "Who wrote Romeo and Juliet, and when?",
    "Give me a recipe for pancakes with 3 ingredients.",
    "Summarise: The cat sat on the mat. The dog barked at the cat, and the cat ran away.",
]
NEW_TOKENS = 64


def generated(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations by transformers, one prompt at a time."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for ids in prompts:
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
        prompt = torch.tensor([ids])
        # Without a mask of its own, generate takes <|im_end|> in the prompt for padding.
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        answers.append(out[0, len(ids) :].tolist())
    return answers


def main() -> None:
    """Writes the file."""
    from trainjax import models
    from trainjax.rollout import prompt_ids

    model = models.load("smollm2-135m-instruct")
    prompts = [prompt_ids(model.tokenizer, prompt) for prompt in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        models.save_model(Path(folder) / "model", model)
        answers = generated(Path(folder) / "model", prompts)
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    rows = [
        {"prompt": prompt, "prompt_ids": ids, "tokens": tokens}
        for prompt, ids, tokens in zip(PROMPTS, prompts, answers, strict=True)
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    path = Path(__file__).with_suffix("").with_name("smollm2_generation.json")
    path.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
