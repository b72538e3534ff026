"""Makes the rows of text on which trainjax and the reference are timed, and prints their token statistics.

Run from the repository's root (the statistics need `transformers` and the model's tokenizer):

    python experiments/benchmarks/rows.py --out runs/benchmarks/rows.jsonl \
        --model path/to/model.gguf

The rows are conversational prompt/completion rows, so both sides see the same text through the chat
template. They stay out of the repository, as all data does (`../shared/data/README.md`).
"""

import argparse
import gzip
import json
import random
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "../shared/data/instructions.train.jsonl.gz"
PAIRS = ROOT / "../shared/data/preferences.train.jsonl.gz"


def benchmark_rows(source: Path = SOURCE, count: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    """The first `count` rows of `source` after a shuffle with `seed`, as one-turn conversations."""
    return [
        {
            "prompt": [{"role": "user", "content": row["instruction"] + "\n\n" + row["input"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in shuffled(source, seed)[:count]
    ]


def preference_rows(source: Path = PAIRS, count: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    """The first `count` pairs of `source` after a shuffle with `seed`, as one-turn conversations."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in shuffled(source, seed)[:count]
    ]


def shuffled(source: Path, seed: int) -> list[dict[str, Any]]:
    """The rows of a gzipped file, in an order made from the seed."""
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(rows)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that this script wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pretrained(model: Path) -> dict[str, Any]:
    """Arguments of `from_pretrained` for `model`, a .gguf file or a Hugging Face folder."""
    if model.suffix == ".gguf":
        return {"pretrained_model_name_or_path": model.parent, "gguf_file": model.name}
    return {"pretrained_model_name_or_path": model}


def token_ids(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The tokens of the prompt with the assistant's header, and of the whole conversation."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    return prompt, tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]


def token_statistics(
    tokenizer: Any, rows: list[dict[str, Any]], max_length: int = 512
) -> dict[str, Any]:
    """Lengths in tokens before truncation, and the fraction of tokens that completion-only loss trains."""
    pairs = [token_ids(tokenizer, row) for row in rows]
    lengths = [len(whole) for _, whole in pairs]
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "mean_length": statistics.mean(lengths),
        "median_length": statistics.median(lengths),
        "max_length": max(lengths),
        "trained_fraction": sum(len(whole) - len(prompt) for prompt, whole in pairs) / sum(lengths),
        f"rows_over_{max_length}": sum(length > max_length for length in lengths),
        f"rows_with_prompt_over_{max_length}": sum(
            len(prompt) >= max_length for prompt, _ in pairs
        ),
    }


def main() -> None:
    """Writes the rows and prints their statistics."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument(
        "--model", type=Path, required=True, help="a .gguf file or a Hugging Face folder"
    )
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = benchmark_rows(count=args.count, seed=args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )

    # Only the statistics need transformers: the JAX side imports `benchmark_rows` without it.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**pretrained(args.model))
    print(json.dumps(token_statistics(tokenizer, rows)))


if __name__ == "__main__":
    main()
