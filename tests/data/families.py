"""Chat templates in the manner of well-known families, and what each makes of an assistant's answer.

They are written for these tests, to have the habits of the families that they are named after: trimmed
words, thoughts that are added or dropped, a prompt that opens a thought, ends of turn that only the last
turn has, headers that generation has to write itself, turns that have to alternate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

END = "<|im_end|>"
_LOOP = "{% for m in messages %}"
_STRICT = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
)
_SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
)
_PLAIN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The user's last message: what comes before it has no thoughts.
_LAST_QUERY = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
_SPLIT_THOUGHT = (
    "{% set c = m.content %}{% set t = '' %}{% if '</think>' in c %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)


class Family(NamedTuple):
    """A template, and what it makes of an answer.

    Attributes:
        template: Jinja.
        said: `(content, final) -> text` that follows the header of a turn, in the text that ends with
            it for `final`; pieces that tags mark one by one are parted by a null character.
        control: control tokens.
        end: end of sequence.
        strict: whether it refuses turns that do not alternate from the user on.
        system: whether it takes a system message.
        begin: beginning of sequence.
        opens: thought that the prompt of generation opens after the header.
        uneven: whether an answer without a thought is written otherwise if another follows at once.
    """

    template: str
    said: Callable[[str, bool], str]
    control: tuple[str, ...]
    end: str = END
    strict: bool = False
    system: bool = True
    begin: str | None = None
    opens: str = ""
    uneven: bool = False


def split(content: str) -> tuple[str, str]:
    """The thought and the answer."""
    if "</think>" not in content:
        return "", content
    thought = content.split("</think>")[0].split("<think>")[-1].strip("\n")
    return thought, content.split("</think>")[-1].lstrip("\n")


def _ended(end: str, change: Callable[[str], str] = lambda content: content) -> Callable:
    return lambda content, final: change(content) + end


def _trimmed(end: str) -> Callable:
    return _ended(end, _strip)


def _strip(content: str) -> str:
    """As Jinja's `trim` does."""
    return content.strip()


def _qwen3(content: str, final: bool) -> str:
    thought, answer = split(content)
    return f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>\n"


def _without_thought(end: str) -> Callable:
    return _ended(end, lambda content: content.split("</think>")[-1])


def _minimax(content: str, final: bool) -> str:
    thought, answer = split(content)
    return f"<think>\n{thought}\n</think>\n\n" * bool(thought) + f"{answer}[e~[\n"


def _glm(content: str, final: bool) -> str:
    thought, answer = split(content)
    return f"\n<think>{thought}</think>\n{answer.strip()}"


_IM = ("<|im_start|>", "<|im_end|>")

FAMILIES = {
    "chatml": Family(_PLAIN_CHATML, _ended("<|im_end|>\n"), _IM),
    "llama2": Family(
        _SYSTEM_FIRST
        + _LOOP
        + _STRICT
        + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}{% if loop.first and system %}"
        "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}{{ m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        lambda content, final: f" {content.strip()} </s>",
        ("<s>", "</s>"),
        "</s>",
        strict=True,
        begin="<s>",
    ),
    "llama3": Family(
        "{{ bos_token }}"
        + _LOOP
        + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        _trimmed("<|eot_id|>"),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        begin="<|begin_of_text|>",
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        + _LOOP
        + _STRICT
        + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        _trimmed("<end_of_turn>\n"),
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        strict=True,
        system=False,
        begin="<bos>",
    ),
    "mistral": Family(
        _SYSTEM_FIRST
        + "{{ bos_token }}"
        + _LOOP
        + _STRICT
        + "{% if m.role == 'user' %}{% if loop.index0 >= messages | length - 2 and tools %}"
        "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
        "{% if loop.revindex0 < 2 and system %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        lambda content, final: f" {content.strip()}</s>",
        ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        "</s>",
        strict=True,
        begin="<s>",
    ),
    "qwen2.5": Family(
        "{% if messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        + _PLAIN_CHATML,
        _ended("<|im_end|>\n"),
        _IM,
    ),
    "qwen3": Family(
        _LAST_QUERY
        + _LOOP
        + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        + _SPLIT_THOUGHT
        + "{% if loop.index0 > ns.last and (loop.last or t) %}"
        "{{ '<think>\n' + t + '\n</think>\n\n' }}{% endif %}{{ c }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _qwen3,
        _IM,
        uneven=True,
    ),
    "deepseek-r1": Family(
        _SYSTEM_FIRST
        + "{{ bos_token + system }}"
        + _LOOP
        + "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
        "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
        _without_thought("<｜end▁of▁sentence｜>"),
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        "<｜end▁of▁sentence｜>",
        begin="<｜begin▁of▁sentence｜>",
        opens="<think>\n",
    ),
    "phi3": Family(
        _LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        lambda content, final: content + "<|end|>\n" + "<|endoftext|>" * final,
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
    ),
    "phi4": Family(
        _LOOP
        + "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        _ended("<|im_end|>"),
        (*_IM, "<|im_sep|>"),
    ),
    "gpt-oss": Family(
        "{{ '<|start|>system<|message|>Knowledge cutoff: 2024-06<|end|>' }}"
        + _LOOP
        + "{% if m.role == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
        "{% else %}{% set role = 'developer' if m.role == 'system' else m.role %}"
        "{{ '<|start|>' + role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        lambda content, final: f"<|channel|>final<|message|>{content}<|return|>",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|return|>",
    ),
    "zephyr": Family(
        _LOOP + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        _ended("</s>\n"),
        ("</s>",),
        "</s>",
    ),
    "vicuna": Family(
        _SYSTEM_FIRST
        + "{{ bos_token + (system or 'A chat between a curious user and an assistant.') }}"
        + _LOOP
        + "{% if m.role == 'user' %}{{ ' USER: ' + m.content.strip() }}"
        "{% else %}{{ ' ASSISTANT: ' + m.content.strip() + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        lambda content, final: f" {content.strip()}</s>",
        ("<s>", "</s>"),
        "</s>",
        begin="<s>",
    ),
    "alpaca": Family(
        _SYSTEM_FIRST
        + "{{ (system or 'Below is an instruction.') + '\n\n' }}"
        + _LOOP
        + "{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + m.content }}{% if loop.last %}{{ eos_token }}{% else %}"
        "{{ '\n\n' }}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
        _ended("</s>"),
        ("</s>",),
        "</s>",
    ),
    "command-r": Family(
        "{{ bos_token }}"
        + _LOOP
        + "{% set role = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m.role] %}"
        "{{ '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        _trimmed("<|END_OF_TURN_TOKEN|>"),
        (
            *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        ),
        "<|END_OF_TURN_TOKEN|>",
        begin="<BOS_TOKEN>",
    ),
    "falcon": Family(
        _LOOP + "{% if not loop.first %}{{ '\n' }}{% endif %}"
        "{% set role = {'user': 'User', 'assistant': 'Falcon', 'system': 'System'}[m.role] %}"
        "{{ role + ': ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nFalcon:' }}{% endif %}",
        lambda content, final: f" {content}",
        ("<|endoftext|>",),
        "<|endoftext|>",
    ),
    "olmo": Family(
        "{{ bos_token }}"
        + _LOOP
        + "{{ '<|' + m.role + '|>\n' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% if not loop.last or m.role != 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        _ended("<|endoftext|>"),
        ("<|endoftext|>",),
        "<|endoftext|>",
        begin="<|endoftext|>",
    ),
    "granite": Family(
        _LOOP
        + "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        _ended("<|end_of_text|>\n"),
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        "<|end_of_text|>",
    ),
    "smollm3": Family(
        "{{ '<|im_start|>system\nReasoning Mode: /think<|im_end|>\n' }}"
        + _LOOP
        + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m.content.lstrip('\n') + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _ended("<|im_end|>", lambda content: content.lstrip("\n")),
        _IM,
    ),
    "glm": Family(
        "{{ '[gMASK]<sop>' }}"
        + _LAST_QUERY
        + _LOOP
        + "{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
        + _SPLIT_THOUGHT
        + "{{ '\n<think>' + (t if loop.index0 > ns.last else '') + '</think>\n' + c.strip() }}"
        "{% else %}{{ '\n' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        _glm,
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
        "<|endoftext|>",
    ),
    "minimax": Family(
        _LAST_QUERY
        + "{{ ']~!b[' }}"
        + _LOOP
        + "{% set role = 'ai' if m.role == 'assistant' else m.role %}{{ ']~b]' + role + '\n' }}"
        "{% if m.role == 'assistant' %}"
        + _SPLIT_THOUGHT
        + "{% if loop.index0 > ns.last and t %}{{ '<think>\n' + t + '\n</think>\n\n' }}{% endif %}{{ c }}"
        "{% else %}{{ m.content }}{% endif %}{{ '[e~[\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ ']~b]ai\n<think>\n' }}{% endif %}",
        _minimax,
        ("]~!b[", "]~b]", "[e~["),
        "[e~[",
        opens="<think>\n",
    ),
    "nemotron": Family(
        _LOOP + "{% if m.role == 'assistant' %}"
        "{{ '<SPECIAL_11>Assistant\n' + m.content.split('</think>')[-1] + '\n<SPECIAL_12>\n' }}{% else %}"
        "{{ '<SPECIAL_11>' + m.role | capitalize + '\n' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<SPECIAL_11>Assistant\n<think>\n' }}{% endif %}",
        _without_thought("\n<SPECIAL_12>\n"),
        ("<SPECIAL_11>", "<SPECIAL_12>"),
        "<SPECIAL_12>",
        opens="<think>\n",
    ),
    "yi": Family(
        _SYSTEM_FIRST
        + "{% if system %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{% endif %}"
        + _LOOP
        + "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if not loop.last or m.role == 'assistant' "
        "or add_generation_prompt %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _ended("<|im_end|>\n"),
        _IM,
    ),
    "internlm": Family(
        "{{ bos_token }}" + _PLAIN_CHATML,
        _ended("<|im_end|>\n"),
        ("<s>", *_IM),
        begin="<s>",
    ),
    "parts": Family(
        _LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _ended("<|im_end|>\n"),
        _IM,
    ),
    "tagged-thoughts": Family(
        _LOOP
        + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        + _SPLIT_THOUGHT
        + "{% if t %}{% generation %}{{ '<think>' + t + '</think>' }}{% endgeneration %}{{ '\n' }}{% endif %}"
        "{% generation %}{{ c + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        lambda content, final: (
            f"<think>{split(content)[0]}</think>\0" * bool(split(content)[0])
            + f"{split(content)[1]}<|im_end|>"
        ),
        _IM,
    ),
}


@functools.cache
def tokenizer(family: Family) -> Any:
    """A byte-level tokenizer with the family's control tokens, which joins a few neighbours."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "a"), ("Ġ", "o"), (":", "Ġ"), (">", "Ċ"), ("Ġ", "Ġ")]
    vocab = [*family.control, *alphabet, *map("".join, merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    # One word, so that neighbours are joined wherever they meet.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in family.control])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=family.end, bos_token=family.begin
    )
    made.chat_template = family.template
    return made
