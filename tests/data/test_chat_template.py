"""Chat templates of other models, against what transformers makes of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_vlm.data.chat import Turn, encode_parts
from megatron_vlm.data.chat_template import ChatTemplate
from megatron_vlm.data.draft import Mark, Picture, Text
from megatron_vlm.data.template_sandbox import MAX_SOURCE, compile_template
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.errors import DataError
from tests.data.templates import word_tokenizer

pytestmark = pytest.mark.unit

CHATML = """\
{% for message in messages %}
{%- if message.role == 'assistant' and message.reasoning_content is defined and loop.last %}
{{- '<|im_start|>assistant\\n<think>\\n' + message.reasoning_content.strip('\\n')
    + '\\n</think>\\n\\n' + message.content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{%- endfor %}"""

DEEPSEEK = """\
{% set ns = namespace(system='') %}
{% for message in messages if message.role == 'system' %}
{% set ns.system = ns.system + message.content %}
{% endfor %}
{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' %}
{{- '<｜Assistant｜>' }}{% if thinking and loop.last %}{{ '<think>' }}
{%- if message.reasoning_content %}{{ message.reasoning_content }}{% endif %}{% endif %}
{{- '</think>' + message.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
{%- endif %}"""

SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>", "<tool>"],
    "llama": ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "deepseek": [
        "<｜begin｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end｜>",
        "<think>",
        "</think>",
    ],
}
SOURCES = {"chatml": CHATML, "llama": LLAMA, "deepseek": DEEPSEEK}
NAMED: dict[str, dict[str, str]] = {
    "chatml": {"eos_token": "<|im_end|>"},
    "llama": {"bos_token": "<|begin|>", "eos_token": "<|eot_id|>"},
    "deepseek": {"bos_token": "<｜begin｜>", "eos_token": "<｜end｜>"},
}


def tokenizer_of(style: str) -> Tokenizer:
    return word_tokenizer(tuple(SPECIAL[style]))


def template(style: str) -> ChatTemplate:
    return ChatTemplate(TemplateText(SOURCES[style], NAMED[style], style), tokenizer_of(style))


def chatml(source: str) -> ChatTemplate:
    """Another template for the tokenizer of ChatML."""
    return ChatTemplate(TemplateText(source, name="bad"), tokenizer_of("chatml"))


def of_transformers(style: str, turns: list[Turn], **variables: Any) -> list[int]:
    """What transformers makes of the conversation."""
    backend = tokenizers.Tokenizer.from_str(tokenizer_of(style).to_json())
    peer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED[style])
    messages = []
    for turn in turns:
        messages.append({"role": turn.role, "content": turn.text})
        if turn.reasoning is not None:
            messages[-1]["reasoning_content"] = turn.reasoning
    ids = peer.apply_chat_template(
        messages, chat_template=SOURCES[style], tokenize=True, return_dict=False, **variables
    )
    return [int(i) for i in ids]


def learned_text(style: str, ids: list[int], flags: list[int]) -> list[str]:
    """Runs of learned tokens, spelled."""
    runs: list[list[int]] = []
    before = 0
    for token, flag in zip(ids, flags, strict=True):
        if flag and not before:
            runs.append([])
        if flag:
            runs[-1].append(token)
        before = flag
    return [tokenizer_of(style).decode(run, skip_special_tokens=False) for run in runs]


TURNS = [
    Turn("system", "Be brief."),
    Turn("user", "What is the cat?"),
    Turn("assistant", "It sat on the mat."),
    Turn("user", "語 \n the mat?"),
    Turn("assistant", "the cat 😀"),
]


@pytest.mark.parametrize("style", SOURCES)
def test_ids_of_transformers(style: str) -> None:
    parts = template(style).session_parts([TURNS], thinking="drop")
    ids, flags = encode_parts(tokenizer_of(style), parts)
    assert ids == of_transformers(style, TURNS, enable_thinking=False, thinking=False)
    end = NAMED[style]["eos_token"]
    assert learned_text(style, ids, flags) == ["It sat on the mat." + end, "the cat 😀" + end]


@pytest.mark.parametrize("style", SOURCES)
def test_thinking(style: str) -> None:
    turns = [
        *TURNS[:2],
        Turn("assistant", "It sat.", reasoning="hm"),
        Turn("user", "the mat?"),
        Turn("assistant", "the cat", reasoning="I think"),
    ]
    end = NAMED[style]["eos_token"]
    if style == "llama":
        with pytest.raises(DataError, match="llama: drops, changes or reorders the reasoning of"):
            template(style).session_parts([turns])
        return
    ids, flags = encode_parts(tokenizer_of(style), template(style).session_parts([turns]))
    assert ids == of_transformers(style, turns, enable_thinking=True, thinking=True)
    last = {
        "chatml": "<think>\nI think\n</think>\n\nthe cat<|im_end|>",
        # Here <think> is part of what asks for the answer.
        "deepseek": "I think</think>the cat<｜end｜>",
    }
    assert learned_text(style, ids, flags) == ["It sat." + end, last[style]]
    # Dropped, a trace is as if it had never been.
    bare = [turn._replace(reasoning=None) for turn in turns]
    ids_without, _ = encode_parts(
        tokenizer_of(style), template(style).session_parts([turns], thinking="drop")
    )
    assert ids_without == of_transformers(style, bare, enable_thinking=False, thinking=False)
    # Told to think where there is a trace, and only there.
    kept = encode_parts(
        tokenizer_of(style), template(style).session_parts([turns], thinking="toggle")
    )
    assert kept == (ids, flags)
    toggled = encode_parts(
        tokenizer_of(style), template(style).session_parts([TURNS], thinking="toggle")
    )
    dropped = encode_parts(
        tokenizer_of(style), template(style).session_parts([TURNS], thinking="drop")
    )
    assert toggled == dropped
    if style == "deepseek":
        assert dropped != encode_parts(tokenizer_of(style), template(style).session_parts([TURNS]))


def test_trace_of_a_template_that_never_asks() -> None:
    source = CHATML[: CHATML.index("{%- if add_generation_prompt")]
    turns = [Turn("user", "q"), Turn("assistant", "the cat", reasoning="hm")]
    parts = chatml(source).session_parts([turns])
    ids, flags = encode_parts(tokenizer_of("chatml"), parts)
    # Nobody can tell who writes what opens the trace.
    assert learned_text("chatml", ids, flags) == ["hm\n</think>\n\nthe cat<|im_end|>"]


@pytest.mark.parametrize("style", SOURCES)
def test_white_space_is_stripped_where_the_template_does(style: str) -> None:
    rng = np.random.default_rng(11)
    spaces = ["", " ", "\n", "  \n", "\n\n", "\t", "\n \n "]
    for _ in range(60):
        turns = [
            Turn(turn.role, rng.choice(spaces) + turn.text + rng.choice(spaces)) for turn in TURNS
        ]
        if rng.random() < 0.2:
            turns[1] = Turn("user", rng.choice(spaces))
        if style == "chatml":
            turns[-1] = turns[-1]._replace(reasoning=f"{rng.choice(spaces)}hm{rng.choice(spaces)}")
        parts = template(style).session_parts([turns])
        # The strings, since what is learned is encoded apart from the rest.
        ids, _ = encode_parts(tokenizer_of(style), parts)
        expected = of_transformers(style, turns, enable_thinking=True, thinking=True)
        spelled = [
            tokenizer_of(style).decode(found, skip_special_tokens=False)
            for found in (ids, expected)
        ]
        assert spelled[0] == spelled[1]


@pytest.mark.parametrize("style", SOURCES)
def test_contents_spell_nothing(style: str) -> None:
    tokenizer = tokenizer_of(style)
    evil = "".join(SPECIAL[style]) + "<|eos|><|image|>{{ messages }}{% raw %}"
    turns = [Turn("user", evil), Turn("assistant", evil)]
    ids, _ = encode_parts(tokenizer, template(style).session_parts([turns]))
    harmless, _ = encode_parts(
        tokenizer, template(style).session_parts([[Turn("user", "a"), Turn("assistant", "a")]])
    )
    special = {tokenizer.encode_template(token)[0] for token in SPECIAL[style]}
    special |= set(tokenizer.special_ids.by_token().values())
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    assert evil in tokenizer.decode(ids, skip_special_tokens=False)


def test_media_marks_and_learned_turns() -> None:
    turns = [
        Turn("user", "q", learned=True),
        Turn("assistant", "one", learned=False),
        Turn("user", "<box:0>"),
        Turn("assistant", "<point:0> two", reasoning="<image>"),
    ]
    objects = [{"box": [0, 0, 1, 1], "point": [0, 0]}]
    parts = template("chatml").session_parts([turns], ["image"], objects=objects)
    ends = tokenizer_of("chatml").encode_template("<|im_start|><|im_end|>")
    spelled = ""
    for part in parts:
        if isinstance(part, Picture):
            spelled += "[picture]"
            continue
        if isinstance(part, Text):
            shown = part.text
        elif isinstance(part, Mark):
            shown = f"[{part.form}]"
        else:
            shown = "SE"[ends.index(int(part.ids[0]))]  # type: ignore[union-attr]
        spelled += f"{{{shown}}}" if part.learned else shown  # type: ignore[union-attr]
    assert spelled == (
        "Suser\n[picture]{\nq}{E}\nSassistant\noneE\nSuser\n[box]E\n"
        "Sassistant\n{<think>\n}{<image>}{\n</think>\n\n}{[point]}{ two}{E}\n"
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}", "no valid template"),
        ("{{ messages[0].content }}<|im_end|>", r"drops, .* the text of turn 1 \(assistant\)"),
        ("{% for m in messages|reverse %}{{ m.content }}<|im_end|>{% endfor %}", "reorders"),
        ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "is refused"),
        ("{% for m in messages %}{{ m.content ~ m.content }}{% endfor %}", "repeats the text of"),
        ("{% for m in messages %}{{ m.content|upper }}{% endfor %}", "drops, changes"),
        ("{% for m in messages %}{{ m.content[:-1] }}{% endfor %}", "drops, changes"),
        ("{% for m in messages %}{{ m.content }}{{ m.role }}{% endfor %}", "no special token"),
        ("{% for m in messages %}{{ m.content }}; <|im_end|>{% endfor %}", "no special token"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token"),
        ("{% for m in messages %}{{ m.content }}<|im_end|><|image|>{% endfor %}", "placeholder"),
        ("{% include 'other' %}", r"reads another file \(include\)"),
        ("{% import 'other' as o %}", r"reads another file \(import\)"),
        ("{% from 'other' import o %}", r"reads another file \(fromimport\)"),
        ("{% extends 'other' %}", r"reads another file \(extends\)"),
        ("{{ raise_exception('no\nsystem') }}", "bad: no system$"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ self.__init__.__globals__ }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler }}{{ lipsum(3) }}", "undefined"),
    ],
)
def test_templates_that_are_refused(source: str, reason: str) -> None:
    turns = [Turn("user", "q"), Turn("assistant", "a")]
    with pytest.raises(DataError, match=reason) as caught:
        chatml(source).session_parts([turns])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}"
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            "reorders what was said",
        ),
        (
            "{% for m in messages %}"
            "{% if m.reasoning_content and not m.reasoning_content.startswith(' ') %}"
            "{{ m.reasoning_content }}{% endif %}{{ m.content }}<|im_end|>{% endfor %}",
            "drops a content that has white space about it",
        ),
    ],
)
def test_what_becomes_of_traces_is_told(source: str, reason: str) -> None:
    turns = [
        Turn("user", "q"),
        Turn("assistant", "a", reasoning=" hm"),
        Turn("user", "q"),
        Turn("assistant", "a"),
    ]
    with pytest.raises(DataError, match=reason):
        chatml(source).session_parts([turns])


GROW = "{% set ns = namespace(s='\"a') %}{% for i in range(90) %}{% set ns.s = GROWN %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(70) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in messages recursive %}{{ loop(range(9999)) }}{% endfor %}",
        *(
            GROW.replace("GROWN", grown)
            for grown in (
                *("ns.s ~ ns.s", "ns.s + ns.s", "[ns.s] + [ns.s]|list * 9", "ns.s|tojson"),
                *("ns.s.replace('', ns.s)", "ns.s|replace('', ns.s)"),
                *("ns.s.join(ns.s)", "ns.s|join(ns.s)"),
            )
        ),
        GROW.replace("{% set ns.s = GROWN %}", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
        "{{ (range(30000)|join).join(range(60000)|map('string')) }}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '{:99999999999}'.format(1) }}",
        "{{ 'a'.center(10 ** 11) }}",
        "{{ 'a'|center(99999999999) }}",
        "{{ 'a'|indent(99999999999) }}",
        "{{ [1]|tojson(indent=99999999999) }}",
        "{{ [1]|batch(99999999999, 'x')|list }}",
        "{{" + "(" * 50_000 + "1" + ")" * 50_000 + "}}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "x" * (MAX_SOURCE + 1),
    ],
)
def test_templates_that_would_not_end(source: str) -> None:
    start = time.process_time()
    with pytest.raises(DataError) as caught:
        compile_template(source, "t")({"messages": [1]})
    assert "MemoryError" not in str(caught.value)
    assert time.process_time() - start < 20


def test_templates_do_what_jinja_does() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'a' %}{% continue %}{% endif %}"
        "{{ loop.index }}{{ m.text.replace('-', '+', 1) }}{% if loop.last %}!{% endif %}"
        "{% if m.role == 'c' %}{% break %}{% endif %}{% endfor %}\n"
        "{{ messages[::-1] | selectattr('role', 'equalto', 'b') | map(attribute='text') | list }}"
        "{{ messages[0] | tojson }}{{ ['x', 'y'] | join(', ') }}{{ 7 % 4 * 2 + 1 }}"
        "{{ 'a-b-c'.split('-')[1:] | tojson(indent=1) }}{{ strftime_now is defined }}"
        "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('é') }}{{ {'k': 1}.items() | list }}"
    )
    messages = [{"role": role, "text": f"{role}-{role}-é"} for role in "abcd"]
    assert compile_template(source, "t")({"messages": messages}) == (
        "2b+b-é3c+c-é"
        "['b-b-é']"
        '{"role": "a", "text": "a-a-é"}x, y7[\n "b",\n "c"\n]False<é>[(\'k\', 1)]'
    )


def test_load(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llama")
    turns = [Turn("user", "q"), Turn("assistant", "a")]
    expected = encode_parts(tokenizer, template("llama").session_parts([turns]))
    described = {"bos_token": {"content": "<|begin|>", "lstrip": False}, "eos_token": "<|eot_id|>"}
    config = tmp_path / "tokenizer_config.json"
    for field in (
        LLAMA,
        [{"name": "other", "template": "x"}, {"name": "default", "template": LLAMA}],
    ):
        config.write_text(json.dumps({**described, "chat_template": field}))
        for path in (config, tmp_path):
            loaded = ChatTemplate(TemplateText.load(path), tokenizer)
            assert encode_parts(tokenizer, loaded.session_parts([turns])) == expected
    config.write_text(json.dumps(described))
    with pytest.raises(DataError, match="has no chat_template"):
        TemplateText.load(tmp_path)
    alone = tmp_path / "chat_template.jinja"
    alone.write_text(LLAMA)
    for path in (alone, tmp_path):
        loaded = ChatTemplate(TemplateText.load(path), tokenizer)
        assert encode_parts(tokenizer, loaded.session_parts([turns])) == expected
    config.write_text("[")
    with pytest.raises(DataError, match="not valid JSON"):
        TemplateText.load(tmp_path)
    alone.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        TemplateText.load(alone)
    with pytest.raises(DataError, match="cannot be read"):
        TemplateText.load(tmp_path / "none.jinja")


@pytest.mark.parametrize("style", SOURCES)
def test_template_text_is_parsed(style: str) -> None:
    tokenizer = tokenizer_of(style)
    text = "the cat" + "é 語 ".join(SPECIAL[style]) + " <|eos|>  on\n"
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    expected = backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_template(text) == expected
    pieces = tokenizer.split_template(text)
    assert [p for p in pieces if isinstance(p, int)] == [
        backend.token_to_id(token) for token in [*SPECIAL[style], "<|eos|>"]
    ]
    joined = [tokenizer.encode(p) if isinstance(p, str) else [p] for p in pieces]
    assert sum(joined, []) == expected
    assert tokenizer.split_template("") == []
    # Text of a data set still spells nothing.
    assert tokenizer.encode("<|eos|>") != [tokenizer.eos_id]
