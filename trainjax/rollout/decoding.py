"""Generation: a jitted prefill and a jitted decoding loop over a key/value cache.

Prompts of unequal length share a batch, padded on the left; a row's tokens depend on its own prompt
and key alone, not on its neighbours. The loop runs on the device and comes back to the host only where
something must be looked at there: stop strings, or a reader who wants the text as it comes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from trainjax import data, parallel, platform
from trainjax.axes import num_row_shards
from trainjax.models import Model, check_tokens
from trainjax.nn import Cache, Decoder, head, num_virtual_tokens, start_cache
from trainjax.ops.head import logits
from trainjax.peft.switched import chosen as with_adapters
from trainjax.rollout.sampling import Drawn, Sampler, greedy, sample
from trainjax.types import Params

_BUCKET = 64  # prompts and answers are padded to multiples of it: a program serves many lengths
_PIECE = 512  # tokens of a prompt that go through the model at once
_GLANCE = 16  # tokens between two looks at the text for a stop string


class Completion(NamedTuple):
    """What a model answered.

    Attributes:
        text: without control tokens, and up to a stop string.
        tokens: ids, with the end-of-sequence token if there was one.
        logprobs: of each token under the model's own distribution: temperature 1, nothing cut off.
        sampler_logprobs: of each under the distribution that it was drawn from; 0 if greedy.
        finish_reason: `stop` for an end token or a stop string, `length` for neither.
    """

    text: str
    tokens: list[int]
    logprobs: np.ndarray
    sampler_logprobs: np.ndarray
    finish_reason: Literal["stop", "length"]


def prompt_ids(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]], *, raw: bool = False
) -> list[int]:
    """Token ids that ask for an answer.

    Args:
        tokenizer: the model's.
        prompt: a user's words, or the messages of a conversation.
        raw: continue the text as it stands, without a chat template. It gets the beginning token of a
            tokenizer that has one, if it does not begin with it, and no end.

    Raises:
        ValueError: no chat template, or one that refuses the messages; an empty raw prompt; half of a
            surrogate pair, which is no character.
    """
    if raw:
        begin, ids = _beginning(tokenizer), _ids(tokenizer, str(prompt))
        ids = ids if ids[: len(begin)] == begin else begin + ids
        if not ids:
            raise ValueError("the prompt is empty, and this tokenizer begins no text by itself")
        return ids
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return _ids(tokenizer, data.apply_template(tokenizer, messages, generation=True))


def _ids(tokenizer: Any, text: str) -> list[int]:
    """The text's own tokens, with none that a tokenizer puts around texts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt holds {text[error.start]!r}, half of a surrogate pair and no character; decode the "
            "text as UTF-8, with errors='replace' where it is damaged"
        ) from error
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def _beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text; what it puts behind one is left out."""
    probe = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
    added = zip(probe.ids, probe.special_tokens_mask, strict=True)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1], added)]


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampler: Sampler = greedy,
    key: PRNGKeyArray | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    adapters: Sequence[int] | None = None,
) -> list[Completion]:
    """Answers to prompts, in their order.

    Of the model's `generation_config.json` the end tokens are used. Its sampling settings are not: the
    sampler says how tokens are drawn, and the file stays as it is beside a model that is saved.

    Args:
        model: with a tokenizer.
        prompts: token ids from `prompt_ids`; a text stands for `prompt_ids(tokenizer, text)`.
        max_new_tokens: longest answer.
        sampler: `greedy`, or from `sampler(temperature=...)`.
        key: for sampling; row i draws from `fold_in(key, i)`, whatever the batch.
        stop: strings that end an answer, besides the model's end-of-sequence tokens.
        batch_size: prompts at once; those of like length go together.
        adapters: for a model with several adapters attached (`peft.switched`), which one each prompt
            goes through; -1 for the base without any.

    Raises:
        ValueError: an empty prompt; one with a token that the vocabulary does not have; one that with its
            answer exceeds the model's `max_length`; sampling without a key; adapters that are not as many
            as prompts, or that the model does not have.

    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one text; give a list of them")
    if adapters is not None and len(adapters) != len(prompts):
        raise ValueError(f"{len(adapters)} adapters for {len(prompts)} prompts: give one for each")
    ids = [prompt_ids(model.tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    answers: dict[int, Completion] = {}
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = min(batch_size, len(ids))  # the last batch is filled up: it needs no other program
        own = None if adapters is None else [adapters[i] for i in chosen]
        batch = _Batch(
            model, [ids[i] for i in chosen], chosen, max_new_tokens, sampler, key, rows, own
        )
        batch.run(stop)
        answers |= zip(chosen, batch.completions(stop), strict=True)
    return [answers[i] for i in range(len(ids))]


def stream(
    model: Model,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 128,
    sampler: Sampler = greedy,
    key: PRNGKeyArray | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The answer to one prompt in pieces of text, as they come; arguments are those of `generate`.

    Together the pieces are the `text` that `generate` gives: a character of several tokens comes when
    it is whole, and what may be the beginning of a stop string when it is known that it is not.
    """
    batch = _Batch(model, [list(prompt)], [0], max_new_tokens, sampler, key, rows=1)
    told = ""
    while True:
        (answer,) = batch.completions(stop)
        done = batch.done() or answer.finish_reason == "stop"
        text = answer.text if done else _settled(answer.text, stop)
        if text.startswith(told) and text != told:
            yield text[len(told) :]
            told = text
        if done:
            return
        batch.advance(1)


def _settled(text: str, stop: Sequence[str]) -> str:
    """The text without what later tokens may still change: half a character, half a stop string."""
    text = text.rstrip("\ufffd")
    held = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return text[: len(text) - max(held, default=0)]


class _State(NamedTuple):
    """What one turn of the decoding loop hands to the next."""

    cache: Cache
    num_drawn: Int[Array, ""]  # tokens a row
    lengths: Int[Array, " rows"]  # of the prompts
    finished: Bool[Array, " rows"]
    drawn: Drawn  # [rows, slots for answers]
    keys: Key[Array, " rows"]


class _Batch:
    """Prompts on their way: the state on the device, and what the host has to know to go on."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[list[int]],
        numbers: Sequence[int],
        max_new_tokens: int,
        sampler: Sampler,
        key: PRNGKeyArray | None,
        rows: int,
        adapters: Sequence[int] | None = None,
    ) -> None:
        _check(model, prompts, numbers, max_new_tokens, sampler, key)
        shards = num_row_shards(model.module.mesh)
        rows = -(-rows // shards) * shards
        if adapters is not None:
            unused = [-1] * (rows - len(prompts))
            model = model.with_params(with_adapters(model.params, [*adapters, *unused]))
        self._model, self._sampler, self._limit = model, sampler, max_new_tokens
        self._prompts = len(prompts)
        self._ends = np.asarray(_end_ids(model), np.int32)
        tokens, lengths = _left_padded(prompts, rows)
        key = jax.random.key(0) if key is None else key
        folds = np.zeros(rows, np.int32)
        folds[: len(numbers)] = numbers
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, folds)
        finished = np.arange(rows) >= len(prompts)
        batch = tokens, lengths, finished
        if model.module.mesh is not None:
            batch = jax.device_put(batch, parallel.rows(model.module.mesh))
        room = -(-max_new_tokens // _BUCKET) * _BUCKET
        self._state = _prefill(model.module, room, model.params, sampler, *batch, keys, self._ends)

    def advance(self, tokens: int) -> None:
        """Draws at most that many tokens more a row."""
        limit = min(int(self._state.num_drawn) + tokens, self._limit)
        args = self._model.params, self._sampler, self._state, self._ends, np.int32(limit)
        self._state = _decode(self._model.module, *args)

    def run(self, stop: Sequence[str]) -> None:
        """Draws until every row has ended."""
        if not stop:
            self.advance(self._limit)
        while not self.done():
            self.advance(_GLANCE)
            if stop:
                self._finish(stop)

    def done(self) -> bool:
        """Whether nothing is left to draw."""
        return bool(self._state.finished.all()) or int(self._state.num_drawn) >= self._limit

    def completions(self, stop: Sequence[str]) -> list[Completion]:
        """The answers so far."""
        drawn = jax.device_get(self._state.drawn)
        count = int(self._state.num_drawn)
        return [self._completion(row, drawn, count, stop) for row in range(self._prompts)]

    def _finish(self, stop: Sequence[str]) -> None:
        """Marks rows whose text has come to a stop string, so that the loop does not wait for them."""
        stopped = np.ones(self._state.finished.shape, bool)
        reasons = [answer.finish_reason for answer in self.completions(stop)]
        stopped[: self._prompts] = [reason == "stop" for reason in reasons]
        layout = self._state.finished.sharding
        self._state = self._state._replace(finished=jax.device_put(stopped, layout))

    def _completion(self, row: int, drawn: Drawn, count: int, stop: Sequence[str]) -> Completion:
        tokens = drawn.tokens[row, :count].tolist()
        end = next((i for i, token in enumerate(tokens) if token in self._ends), None)
        if end is not None:
            tokens = tokens[: end + 1]
        text = self._text(tokens)
        found = [at for s in stop if (at := text.find(s)) >= 0]
        if found:
            text = text[: min(found)]
            tokens = self._until(tokens, stop)
        reason: Literal["stop", "length"] = "length" if end is None and not found else "stop"
        logprobs, sampler_logprobs = (
            np.asarray(x)[row, : len(tokens)] for x in (drawn.logprobs, drawn.sampler_logprobs)
        )
        return Completion(text, tokens, logprobs, sampler_logprobs, reason)

    def _until(self, tokens: list[int], stop: Sequence[str]) -> list[int]:
        """The fewest of the tokens whose text holds a stop string."""
        for count in range(1, len(tokens)):
            text = self._text(tokens[:count])
            if any(s in text for s in stop):
                return tokens[:count]
        return tokens

    def _text(self, tokens: list[int]) -> str:
        return self._model.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _check(
    model: Model,
    prompts: Sequence[list[int]],
    numbers: Sequence[int],
    max_new_tokens: int,
    sampler: Sampler,
    key: PRNGKeyArray | None,
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: an answer has at least one token")
    if sampler.temperature is not None and key is None:
        raise ValueError("sampling needs a key: key=jax.random.key(0)")
    before = num_virtual_tokens(model.params)
    for number, prompt in zip(numbers, prompts, strict=True):
        if not prompt:
            raise ValueError(f"prompt {number} is empty")
        try:
            check_tokens(model.config, prompt)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
        if before + len(prompt) + max_new_tokens > model.config.max_length:
            virtual = f" after {before} virtual ones" if before else ""
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens{virtual}; with "
                f"max_new_tokens={max_new_tokens} that is more than the "
                f"{model.config.max_length} that the model was made for"
            )


def _end_ids(model: Model) -> list[int]:
    """The tokens that end an answer: those that transformers knows, and the tokenizer's own.

    The first are those of `generation_config.json`, or where it names none of `config.json`. The other
    is what training puts at the end of an answer.
    """
    named = model.generation.get("eos_token_id")
    named = model.hf.get("eos_token_id") if named is None else named
    ends = named if isinstance(named, list) else [named]
    own = None if model.tokenizer is None else model.tokenizer.eos_token_id
    return sorted({end for end in [*ends, own] if end is not None}) or [-1]


def _left_padded(prompts: Sequence[list[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    width = -(-max(map(len, prompts)) // _BUCKET) * _BUCKET
    width = width if width < _PIECE else -(-width // _PIECE) * _PIECE
    tokens, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths


@functools.partial(platform.jit, static_argnums=(0, 1))
def _prefill(
    module: Decoder,
    room: int,
    params: Params,
    sampler: Sampler,
    tokens: Int[Array, "rows width"],
    lengths: Int[Array, " rows"],
    finished: Bool[Array, " rows"],
    keys: Key[Array, " rows"],
    ends: Int[Array, " ends"],
) -> _State:
    """The prompts in the cache, and the first token drawn."""
    rows, width = tokens.shape
    positions = jnp.arange(width, dtype=jnp.int32) - (width - lengths[:, None])
    real = (positions >= 0).astype(jnp.int32)

    def feed(carry: Any, piece: Any) -> Any:
        hidden, cache = module.apply({"params": params}, *piece, carry[0])
        return (cache, hidden[:, -1]), None

    pieces = tuple(_pieces(x) for x in (tokens, jnp.maximum(positions, 0), real))
    cache = start_cache(module, params, rows, width + room)
    hidden = jnp.zeros((rows, module.config.hidden_size), module.dtype)
    (cache, hidden), _ = jax.lax.scan(feed, (cache, hidden), pieces)
    empty = Drawn(
        *(jnp.zeros((rows, room), kind) for kind in (jnp.int32, jnp.float32, jnp.float32))
    )
    state = _State(cache, jnp.zeros((), jnp.int32), lengths, finished, empty, keys)
    return _drawn(module, params, sampler, state, hidden, ends)


def _pieces(x: Array) -> Array:
    """`[rows, width] -> [pieces, rows, piece]`."""
    rows, width = x.shape
    return jnp.swapaxes(x.reshape(rows, -1, min(width, _PIECE)), 0, 1)


@functools.partial(platform.jit, static_argnums=0, donate_argnums=3)
def _decode(
    module: Decoder,
    params: Params,
    sampler: Sampler,
    state: _State,
    ends: Int[Array, " ends"],
    limit: Int[Array, ""],
) -> _State:
    """Draws tokens until every row has ended or `limit` are there."""

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.num_drawn < limit) & ~jnp.all(state.finished)

    def one_token(state: _State) -> _State:
        last = jax.lax.dynamic_slice_in_dim(state.drawn.tokens, state.num_drawn - 1, 1, axis=1)
        positions = (state.lengths + state.num_drawn - 1)[:, None]
        hidden, cache = module.apply({"params": params}, last, positions, None, state.cache)
        state = state._replace(cache=cast(Cache, cache))
        return _drawn(module, params, sampler, state, hidden[:, -1], ends)

    return jax.lax.while_loop(unfinished, one_token, state)


def _drawn(
    module: Decoder,
    params: Params,
    sampler: Sampler,
    state: _State,
    hidden: Float[Array, "rows embed"],
    ends: Int[Array, " ends"],
) -> _State:
    """The state with one more token a row."""
    scores = logits(hidden, head(module.config, params))
    new = sample(
        sampler, scores, jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.num_drawn)
    )
    drawn = Drawn(
        *(
            jax.lax.dynamic_update_slice_in_dim(all_, one[:, None], state.num_drawn, axis=1)
            for all_, one in zip(state.drawn, new, strict=True)
        )
    )
    ended = jnp.any(new.tokens[:, None] == ends[None, :], axis=1)
    return state._replace(
        drawn=drawn, num_drawn=state.num_drawn + 1, finished=state.finished | ended
    )
