"""Data sets whose dialogues a chat template wrote, against what transformers makes of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.data import build
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.chat import THOUGHT, ThinkingSettings, Turn, encode_parts
from megatron_vlm.data.chat_template import ChatTemplate
from megatron_vlm.data.format import DATASET_FILE, TEMPLATE_FILE
from megatron_vlm.data.index import DatasetIndex, open_dataset
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.errors import DataError
from tests.data.pdf_files import Page, pdf, prose
from tests.data.samples import encoded, picture
from tests.data.sources.reading import write_tar
from tests.data.sources.test_energon import prepare
from tests.data.templates import (
    ENDS,
    NAMED,
    SOURCES,
    of_transformers,
    tokenizer_of,
    word_tokenizer,
    write_model,
)

pytestmark = pytest.mark.unit

STYLES = pytest.mark.parametrize("style", SOURCES)


def text_of(style: str) -> TemplateText:
    return TemplateText(SOURCES[style], NAMED[style], style)


def template(style: str) -> ChatTemplate:
    return ChatTemplate(text_of(style), tokenizer_of(style))


def built(source: Path, out: Path, style: str, **changes: Any) -> DatasetIndex:
    build_dataset(
        source, out, tokenizer=tokenizer_of(style), template=text_of(style), workers=1, **changes
    )
    return open_dataset(out)


def samples(index: DatasetIndex) -> list[tuple[list[int], list[int]]]:
    """Ids and loss flags of every sample, from the tar's own bytes."""
    columns, found = index.columns, []
    for number in range(index.num_samples):
        shard = index.folder / index.shard_names[columns.sample_shard[number]]
        start = int(columns.sample_offset[number])
        content = shard.read_bytes()[start : start + int(columns.sample_size[number])]
        ids, flags = np.load(io.BytesIO(content), allow_pickle=False).tolist()
        found.append((ids, flags))
    return found


def messages_of(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What transformers is given: placeholders for marks, and no fields of ours."""
    return [
        {
            **{key: value for key, value in turn.items() if key != "learned"},
            "content": turn["content"].replace("<image>", "<|image|>"),
        }
        for turn in turns
    ]


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [said("user", "What is it?"), said("assistant", "It is a cat.")],
    [
        said("system", "the mat"),
        said("user", "<image>What is <image> on\nthe mat?"),
        said("assistant", "the cat sat <image>"),
        said("user", "語?"),
        said("assistant", "\n It is 😀 a cat"),
    ],
    [said("assistant", "It is a cat."), said("user", "What?"), said("assistant", "a cat")],
]
THINKING: list[list[dict[str, Any]]] = [
    [
        said("user", "What is it?"),
        said("assistant", "It sat.", reasoning_content="hm, the\nmat"),
        said("user", "<image> the mat?"),
        said("assistant", "the cat", reasoning_content="\nI is it\n"),
    ],
    [said("user", "What is it?"), said("assistant", "It is a cat.")],
]


def write_conversations(folder: Path, conversations: list[list[dict[str, Any]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, turns in enumerate(conversations):
        count = sum(turn["content"].count("<image>") for turn in turns)
        names = [f"{number}-{ordinal}.png" for ordinal in range(count)]
        for name in names:
            picture(30, 40, seed=number).save(folder / name)
        entries.append({"images": names, "messages": turns})
    (folder / "list.json").write_text(json.dumps(entries))
    return folder / "list.json"


@STYLES
def test_ids_and_masks_are_those_of_transformers(style: str, tmp_path: Path) -> None:
    source = write_conversations(tmp_path / "source", CONVERSATIONS)
    index = built(source, tmp_path / "out", style)
    found = samples(index)
    assert len(found) == len(CONVERSATIONS) and index.num_pictures == 3
    for (ids, flags), turns in zip(found, CONVERSATIONS, strict=True):
        expected = of_transformers(style, messages_of(turns), enable_thinking=True)
        # A placeholder grows into features: no token can predict it, whoever says it.
        image = tokenizer_of(style).image_id
        mask = [flag * (token != image) for token, flag in zip(*expected, strict=True)]
        assert (ids, flags) == (expected[0], mask)
        assert 0 < sum(flags) < len(flags)
    columns = index.columns
    placed = np.flatnonzero(np.array(found[1][0]) == tokenizer_of(style).image_id)
    assert columns.picture_position.tolist() == placed.tolist()


@pytest.mark.parametrize("mode", ["keep", "drop", "toggle"])
def test_thinking(mode: Any, tmp_path: Path) -> None:
    source = write_conversations(tmp_path / "source", THINKING)
    options = SourceOptions(thinking=ThinkingSettings(mode))
    found = samples(built(source, tmp_path / "out", "qwen", options=options))
    for (ids, flags), turns in zip(found, THINKING, strict=True):
        given = messages_of(turns)
        if mode == "drop":
            given = [{key: turn[key] for key in ("role", "content")} for turn in given]
        traced = any("reasoning_content" in turn for turn in given)
        thinks = traced if mode == "toggle" else mode == "keep"
        expected = of_transformers("qwen", given, enable_thinking=thinks)
        assert (ids, flags) == expected
    spelled = tokenizer_of("qwen").decode(found[0][0], skip_special_tokens=False)
    assert ("<think>\nI is it\n</think>\n\nthe cat" in spelled) == (mode != "drop")
    # Of an earlier answer the template leaves the trace out.
    assert "hm, the" not in spelled


@STYLES
def test_each_sample_begins_with_its_prompt(style: str, tmp_path: Path) -> None:
    turns = [said("system", "the mat"), said("user", "<image>\nWhat?"), said("assistant", "a cat")]
    source = write_conversations(tmp_path / "source", [turns])
    ((ids, flags),) = samples(built(source, tmp_path / "out", style))
    prompt = template(style).prompt("What?", 1, system="the mat")
    assert ids[: len(prompt)] == prompt and not any(flags[: len(prompt)])
    assert all(flags[len(prompt) : ids.index(max(template(style).end_ids), len(prompt))])


@STYLES
@pytest.mark.parametrize("thinks", [None, True, False])
@pytest.mark.parametrize("system", [None, "the mat", " \n"])
def test_prompts_are_those_of_transformers(
    style: str, thinks: bool | None, system: str | None
) -> None:
    questions = [("What is it?", 0), ("  What\n", 2), ("on <image> the\n<image>mat", 2), ("", 1)]
    if thinks is not None and style == "llama":
        with pytest.raises(DataError, match="thinking o.*: llama asks for an answer alike"):
            template(style).prompt("q", thinks=thinks)
        return
    for question, count in questions:
        opening = "" if "<image>" in question else "<|image|>" * count + "\n" * (count > 0)
        given = [] if system is None else [said("system", system)]
        given.append(said("user", opening + question.replace("<image>", "<|image|>")))
        switch = {} if thinks is None else {"enable_thinking": thinks}
        expected = of_transformers(style, given, add_generation_prompt=True, **switch)[0]
        found = template(style).prompt(question, count, system=system, thinks=thinks)
        assert found == expected
    with pytest.raises(DataError, match="1 <image> marks but 2 pictures"):
        template(style).prompt("<image>", 2)


@STYLES
def test_what_ends_an_answer(style: str) -> None:
    ids = template(style).end_ids
    assert [tokenizer_of(style).decode([i], skip_special_tokens=False) for i in ids] == [
        ENDS[style]
    ]


def test_several_sessions(tmp_path: Path) -> None:
    sessions = [CONVERSATIONS[0], [said("user", "<image> the mat?"), said("assistant", "a cat")]]
    picture(30, 40).save(tmp_path / "a.png")
    source = tmp_path / "list.json"
    source.write_text(json.dumps([{"sessions": sessions, "image": "a.png"}]))
    ((ids, flags),) = samples(built(source, tmp_path / "llama", "llama"))
    expected = [of_transformers("llama", messages_of(turns)) for turns in sessions]
    assert (ids, flags) == tuple(sum(parts, []) for parts in zip(*expected, strict=True))
    with pytest.raises(DataError, match="qwen: opens a conversation with no special token of its"):
        built(source, tmp_path / "qwen", "qwen")


@STYLES
def test_preferences_and_tars(style: str, tmp_path: Path) -> None:
    source = tmp_path / "pairs.json"
    turns = [said("user", "What?"), said("assistant", "It is."), said("user", "the mat?")]
    pair = {"prompt": turns, "chosen": "a cat", "rejected": "the mat"}
    source.write_text(json.dumps([pair]))
    index = built(source, tmp_path / "pairs", style)
    assert index.kind == "preference"
    for (ids, flags), side in zip(samples(index), ("chosen", "rejected"), strict=True):
        answer = [said("assistant", pair[side])]
        whole, mask = of_transformers(style, turns + answer)
        before = len(of_transformers(style, turns)[0])
        assert ids == whole
        # What the prompt's assistant said is not learned.
        assert flags == [0] * before + mask[before:]
    file = encoded(picture(30, 40))
    entry = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a"}]}
    members = [("0.png", file), ("0.json", json.dumps(entry).encode())]
    ((ids, flags),) = samples(
        built(write_tar(tmp_path / "a.tar", members), tmp_path / "tar", style)
    )
    asked = [said("user", "<|image|>\nWhat?"), said("assistant", "a")]
    assert (ids, flags) == of_transformers(style, asked)
    question = {"json": json.dumps({"q": "What?", "a": ["the cat"]}).encode(), "png": file}
    fields = {"image": "png", "context": "json[q]", "answers": "json[a]"}
    folder = prepare(tmp_path / "energon", [question], "VQASample", fields)
    (folder / ".nv-meta" / "split.yaml").write_text(
        json.dumps({"split_parts": {"train": ["shards/shard_000.tar"]}})
    )
    ((ids, flags),) = samples(built(folder, tmp_path / "vqa", style))
    asked = [said("user", "<|image|>\nWhat?"), said("assistant", "the cat")]
    assert (ids, flags) == of_transformers(style, asked)


@STYLES
@pytest.mark.parametrize("learn_thoughts", [False, True])
def test_trajectories(style: str, learn_thoughts: bool, tmp_path: Path) -> None:
    steps = [
        {"image": "a.png", "thought": "the cat", "action": "click(<point:0>)"},
        {"image": "a.png", "action": "wait() \n"},
    ]
    objects = [{"image": 0, "point": [15, 20]}]
    entry = {"instruction": " What <image> it?", "steps": steps, "objects": objects}
    picture(30, 40).save(tmp_path / "a.png")
    source = tmp_path / "list.json"
    source.write_text(json.dumps([entry]))
    options = SourceOptions(learn_thoughts=learn_thoughts)
    ((ids, flags),) = samples(built(source, tmp_path / "out", style, options=options))
    first = "Thought: the cat\nAction: click(<point>375 666</point>)"
    turns = [
        said("user", " What <image> it?\n<|image|>"),
        said("assistant", first),
        said("user", "<|image|>"),
        said("assistant", "Action: wait() \n"),
    ]
    expected, _ = of_transformers(style, turns, enable_thinking=True)
    spelled = tokenizer_of(style).decode(ids, skip_special_tokens=False)
    assert spelled == tokenizer_of(style).decode(expected, skip_special_tokens=False)
    assert ids.count(tokenizer_of(style).image_id) == 2
    learned = "".join(
        tokenizer_of(style).decode([i], skip_special_tokens=False) if flag else "\0"
        for i, flag in zip(ids, flags, strict=True)
    )
    runs = [run for run in learned.split("\0") if run]
    action = first if learn_thoughts else first.removeprefix("Thought: the cat\n")
    end = ENDS[style]
    last = "Action: wait() \n" + end if style == "qwen" else "Action: wait()" + end
    if style == "qwen":
        last = THOUGHT.format(reasoning="") + last
    assert runs == [action + end, last]


def test_masked_pages(tmp_path: Path) -> None:
    page = Page()
    for top in (470, 330, 190):
        page.paragraph(40, top, prose(top, 40))
    (tmp_path / "a.pdf").write_bytes(pdf(page))
    source = tmp_path / "a.pdf"
    options = SourceOptions(pdf_mode="masked")
    plain = tmp_path / "plain"
    build_dataset(source, plain, tokenizer=tokenizer_of("llama"), options=options, workers=1)
    tokenizer = tokenizer_of("llama")
    ((ids, flags),) = samples(open_dataset(plain))
    text = tokenizer.decode(ids, skip_special_tokens=False)
    question, answer = text.split("<|end|><|assistant|>")
    asked = question.removeprefix("<|user|>")
    turns = [said("user", asked), said("assistant", answer.removesuffix("<|end|><|eos|>"))]
    found = samples(built(source, tmp_path / "out", "llama", options=options))
    assert found == [of_transformers("llama", turns)]


def test_what_a_template_cannot_say(tmp_path: Path) -> None:
    documents = tmp_path / "a.txt"
    documents.write_text("a document")
    with pytest.raises(DataError, match="holds documents, which have no turns that qwen could wri"):
        built(documents, tmp_path / "out", "qwen")
    source = str(write_conversations(tmp_path / "source", CONVERSATIONS))
    model = {style: str(write_model(tmp_path / style, style)) for style in SOURCES}
    words = ["data", "build", source, str(tmp_path / "out"), "--workers", "1"]

    def refused(style: str, *more: str, tokenizer: bool = True) -> str:
        given = ["--tokenizer", f"{model[style]}/tokenizer.json"] if tokenizer else []
        with pytest.MonkeyPatch.context() as patch:
            errors = io.StringIO()
            patch.setattr("sys.stderr", errors)
            assert main([*words, "--chat-template", model[style], *given, *more]) == 2
        assert errors.getvalue().count("\n") == 1
        return errors.getvalue()

    assert "ends a learned turn with no special token" in refused("qwen", tokenizer=False)
    assert "toggle: " in refused("llama", "--thinking", "toggle")
    toggled = ("--thinking", "toggle", "--plain-prompt", "be brief")
    assert "--plain-prompt are of the built-in format" in refused("qwen", *toggled)
    (tmp_path / "llama" / "chat_template.jinja").write_text(
        SOURCES["llama"].replace("if add_generation_prompt", "if false")
    )
    assert "asks for no answer where add_generation_prompt is true" in refused("llama")
    (tmp_path / "llama" / "tokenizer_config.json").unlink()
    assert "writes bos_token, eos_token, and there is no tokenizer_config.json" in refused("llama")
    (tmp_path / "llama" / "chat_template.jinja").unlink()
    assert "has no chat_template.jinja, no chat_template.json, and no" in refused("llama")
    assert not (tmp_path / "out").exists()


def test_a_set_keeps_its_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_conversations(tmp_path / "source", CONVERSATIONS)
    model = write_model(tmp_path / "model", "llama")
    out = tmp_path / "out"
    words = ["--tokenizer", str(model / "tokenizer.json"), "--workers", "1"]
    command = ["data", "build", str(source), str(out), *words]
    assert main([*command, "--chat-template", str(model)]) == 0
    index = open_dataset(out)
    assert index.template == text_of("llama")
    kept = index.folder / TEMPLATE_FILE
    assert json.loads(kept.read_text())["bos_token"] == "<|begin_of_text|>"
    record = json.loads((out / DATASET_FILE).read_text())
    assert record["chat"]["template"] == {"name": TEMPLATE_FILE, "sha256": text_of("llama").sha256}
    # What a set keeps can be given again, also to the build that replaces it.
    before = samples(index)
    assert main([*command, "--chat-template", str(kept), "--overwrite"]) == 0
    again = open_dataset(out)
    assert again.folder == index.folder and samples(again) == before
    # Another template is another build, whatever its samples are.
    settings: list[Any] = []
    sign = build.sign
    monkeypatch.setattr(build, "sign", lambda *a: settings.append(a[2]["template"]) or sign(*a))
    other = TemplateText(SOURCES["llama"] + "{# other #}", NAMED["llama"])
    build_dataset(source, tmp_path / "o", tokenizer=tokenizer_of("llama"), template=other)
    assert settings == [other.sha256] and other.sha256 != text_of("llama").sha256
    assert open_dataset(tmp_path / "o").folder.name != index.folder.name
    assert main([*command, "--overwrite"]) == 0
    plain = open_dataset(out)
    assert plain.template is None and not (plain.folder / TEMPLATE_FILE).exists()
    assert not index.folder.exists()
    changed = open_dataset(tmp_path / "o").folder / TEMPLATE_FILE
    changed.write_text(changed.read_text().replace("other", "others"))
    with pytest.raises(DataError, match="differs from the chat template that the samples were"):
        open_dataset(tmp_path / "o")
    changed.unlink()
    with pytest.raises(DataError, match=r"chat_template\.json: missing"):
        open_dataset(tmp_path / "o")


def test_where_templates_are_found(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama")
    config, alone = model / "tokenizer_config.json", model / "chat_template.jinja"
    expected = text_of("llama")
    assert TemplateText.load(model) == TemplateText.load(alone) == expected
    spelled = json.loads(config.read_text())
    alone.rename(model / "other.jinja")
    assert TemplateText.load(model / "other.jinja") == expected
    (model / "chat_template.json").write_text(json.dumps({"chat_template": SOURCES["llama"]}))
    assert TemplateText.load(model) == expected
    config.unlink()
    (model / "special_tokens_map.json").write_text(json.dumps(spelled))
    assert TemplateText.load(model) == TemplateText.load(model / "other.jinja") == expected
    assert TemplateText.from_json(expected.to_json(), "kept") == expected
    # A template that names no token needs none spelled.
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "qwen.jinja").write_text(SOURCES["qwen"])
    assert TemplateText.load(tmp_path / "far" / "qwen.jinja").special_tokens == {}


def test_what_the_assistant_writes_before_its_answer_is_learned() -> None:
    """Told to think and without a trace, it is the assistant that closes the empty one."""
    turns = [Turn("user", "What?"), Turn("assistant", "a cat")]
    tokenizer = word_tokenizer(("<bot>", "<user>", "<think>", "</think>", "<end>"))
    source = (
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}"
        "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<bot>{{ '<think>' if thinking else '<think></think>' }}"
        "{% endif %}"
    )
    found = ChatTemplate(TemplateText(source), tokenizer)
    for mode, learned in (("keep", "</think>a cat<end>"), ("drop", "a cat<end>")):
        ids, flags = encode_parts(tokenizer, found.session_parts([turns], thinking=mode))  # type: ignore[arg-type]
        chosen = [token for token, flag in zip(ids, flags, strict=True) if flag]
        assert tokenizer.decode(chosen, skip_special_tokens=False) == learned
