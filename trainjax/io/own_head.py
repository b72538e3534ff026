"""Whether a model's output head is its embedding: by the tensors, where the config says another thing."""

from __future__ import annotations

import logging

import numpy as np

from trainjax.io.folder import HfFolder

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 4096  # compared at a time: a head may have a gigabyte


def with_its_head(files: HfFolder) -> HfFolder:
    """The folder, with a config that does not call a head tied which is not the embedding.

    Some files hold both tensors and `tie_word_embeddings`. An equal copy is left out by who reads them;
    a head of other numbers was trained by itself, and is used: a warning says so.

    Source: agrees with transformers 5, `PreTrainedModel.tie_weights`.
    """
    if files.config.get("tie_word_embeddings") and _differs(files):
        logging.getLogger(__name__).warning(
            "%s: config.json ties the output head to the embedding, but %s has other numbers; it is used, "
            "and the two are not tied (tie_word_embeddings=false in config.json silences this)",
            files.path,
            _HEAD,
        )
        files.config["tie_word_embeddings"] = False
    return files


def _differs(files: HfFolder) -> bool:
    if not any(
        files.path.glob("*.safetensors")
    ):  # its tokenizer and its config are there to be read
        return False
    shapes = files.shapes()
    if _HEAD not in shapes or _EMBEDDING not in shapes:
        return False
    if shapes[_HEAD] != shapes[_EMBEDDING]:
        return True
    both = zip(files.parts(_HEAD, _ROWS), files.parts(_EMBEDDING, _ROWS), strict=True)
    return not all(np.array_equal(head, embedding) for head, embedding in both)
