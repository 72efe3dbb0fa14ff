"""Chat templates as models are published with, tokenizers for them, and what transformers makes.

Both mark with `{% generation %}` what the assistant says, so that transformers tells the mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megatron_vlm.data.tokenizer import Tokenizer

QWEN = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(query=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not ns.found %}
        {%- set ns.query = messages|length - 1 - loop.index0 %}
        {%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- set thought = (message.reasoning_content or '').strip('\\n') %}
        {%- set said = message.content.lstrip('\\n') %}
        {%- if loop.index0 < ns.query %}
            {%- generation %}{{- said + '<|im_end|>' }}{% endgeneration %}
        {%- elif enable_thinking is defined and enable_thinking is false %}
            {{- '<think>\\n\\n</think>\\n\\n' }}
            {%- generation %}{{- said + '<|im_end|>' }}{% endgeneration %}
        {%- else %}
            {%- generation %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' + said + '<|im_end|>' }}
            {%- endgeneration %}
        {%- endif %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
"""ChatML with a system prompt and thinking: traces before the last question are left out."""

LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""Headers with roles, one token before all and one after each turn; white space is trimmed."""

SOURCES = {"qwen": QWEN, "llama": LLAMA}
SPECIAL = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
NAMED: dict[str, dict[str, str]] = {
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
}
ENDS = {style: named["eos_token"] for style, named in NAMED.items()}


@cache
def word_tokenizer(special: tuple[str, ...], vocab_size: int = 500) -> Tokenizer:
    """A vocabulary with merges and some special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    # Line breaks stay together whatever follows, as in the tokenizers that these models have.
    words = tokenizers.Regex(r" ?\p{L}+| ?[^\s\p{L}]+|\s*[\r\n]+|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    text = "user\nassistant\nsystem\nthe cat sat on the mat.\n\n What is it? It is a cat"
    backend.train_from_iterator([text] * 9, trainer)
    return Tokenizer(backend)


def tokenizer_of(style: str) -> Tokenizer:
    """The tokenizer of one of the templates above."""
    return word_tokenizer(tuple(SPECIAL[style]), 340)


def write_model(folder: Path, style: str) -> Path:
    """A model's folder as far as its tokenizer and template go."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_of(style).to_json())
    described = {name: {"content": text, "lstrip": False} for name, text in NAMED[style].items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "chat_template.jinja").write_text(SOURCES[style])
    return folder


def of_transformers(
    style: str, messages: Sequence[dict[str, Any]], **variables: Any
) -> tuple[list[int], list[int]]:
    """Ids and mask of a conversation; pictures are `<|image|>` in its texts."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer.from_str(tokenizer_of(style).to_json())
    peer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED[style])
    asks = bool(variables.get("add_generation_prompt"))
    found = peer.apply_chat_template(
        list(messages),
        chat_template=SOURCES[style],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=not asks,
        **variables,
    )
    ids = [int(i) for i in found["input_ids"]]
    return ids, [] if asks else [int(flag) for flag in found["assistant_masks"]]
