"""Another model's chat template all the way: built, trained, asked, exported, asked there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.checkpoint.chat import read_template
from megatron_vlm.checkpoint.folder import find_checkpoint
from megatron_vlm.cli.main import main
from megatron_vlm.config import load_recipe
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.chat import Turn, encode_conversation
from megatron_vlm.data.chat_template import ChatTemplate
from megatron_vlm.data.draft import Picture, Text, Tokens, Video
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.errors import ConfigError
from megatron_vlm.platform import World
from megatron_vlm.training.chat import chat_template
from megatron_vlm.training.datasets import open_training_data
from tests.data.samples import encoded, picture
from tests.data.templates import ENDS, NAMED, SOURCES, of_transformers, tokenizer_of, write_model
from tests.data.test_built_templates import CONVERSATIONS, said, write_conversations
from tests.ranks import run_ranks
from tests.release.commands import released
from tests.release.folders import write_folder
from tests.release.test_hub_models import run_outside
from tests.training_case import recipe, train_case

RUN = ("training.train_iters=2", "training.precision=fp32", "data.validation={}")
WIDE = ("model.language.vocab_size=512", "training.seq_length=256")
QUESTIONS: tuple[tuple[str, int], ...] = (
    ("What is it?", 0),
    ("What is it?", 1),
    ("the <image> on\n<image>mat", 2),
    ("  ", 2),
)


def text_of(style: str) -> TemplateText:
    return TemplateText(SOURCES[style], NAMED[style])


def data_set(folder: Path, style: str, pictures: bool = True) -> Path:
    conversations = CONVERSATIONS if pictures else CONVERSATIONS[::2]
    source = write_conversations(folder / f"{style}_source", conversations)
    tokenizer, template = tokenizer_of(style), text_of(style)
    build_dataset(source, folder / style, tokenizer=tokenizer, template=template, workers=1)
    return folder / style


def _ask(
    _: World, run_dir: Path, asked: list[dict[str, Any]]
) -> tuple[list[list[int]], list[str], list[str]]:
    """Prompts of the questions, their answers, and which tokens end them."""
    from megatron_vlm.evaluation.generate import Answerer, Question

    with Answerer.from_checkpoint(run_dir) as answerer:
        questions = [
            Question(
                each["text"],
                tuple(Path(file).read_bytes() for file in each["pictures"]),
                system=each.get("system"),
                thinks=each.get("thinks"),
            )
            for each in asked
        ]
        prompts = [answerer._prompt(question).ids for question in questions]
        ends = [answerer.tokenizer.spelling(i) for i in sorted(answerer.end_ids)]
        return prompts, answerer.answer(questions, 6), ends


@pytest.mark.distributed
@pytest.mark.parametrize("style", SOURCES)
def test_with_pictures(style: str, tmp_path: Path) -> None:
    from megatron_vlm.release.exporting import export_checkpoint

    data = data_set(tmp_path, style)
    run_dir, folder = tmp_path / "run", tmp_path / "exported"
    train_case(recipe(tmp_path, run_dir, f"data.train={data}", *RUN, *WIDE))
    assert read_template(find_checkpoint(run_dir)) == text_of(style)
    export_checkpoint(run_dir, folder)
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for number, file in enumerate(files):
        file.write_bytes(encoded(picture(30 + 28 * number, 40, seed=number)))
    asked: list[dict[str, Any]] = []
    for text, count in QUESTIONS:
        for system in (None, "the mat"):
            for thinks in (None, True, False) if style == "qwen" else (None,):
                given = {"text": text, "pictures": [str(file) for file in files[:count]]}
                asked.append({**given, "system": system, "thinks": thinks})
    ((prompts, answers, ends),) = run_ranks(1, _ask, run_dir, asked)
    assert ends == sorted({"<|eos|>", ENDS[style]}, key=tokenizer_of(style).encode_template)
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"asked": asked, "max_new_tokens": 6}))
    run_outside(tmp_path, "chat", folder, request, tmp_path / "result.json")
    theirs = json.loads((tmp_path / "result.json").read_text())
    assert [each["prompt"] for each in theirs] == prompts
    assert [each["text"] for each in theirs] == answers
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts) - 2 * 4 * (style == "qwen")
    config = json.loads((folder / "generation_config.json").read_text())
    spelled = [tokenizer_of(style).spelling(i) for i in config["eos_token_id"]]
    assert sorted(spelled) == sorted(ends)


@pytest.mark.distributed
@pytest.mark.parametrize("style", SOURCES)
def test_text_alone(style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    from megatron_vlm.release.exporting import export_checkpoint

    data = data_set(tmp_path, style, pictures=False)
    run_dir, folder = tmp_path / "run", tmp_path / "exported"
    words = (f"data.train={data}", "model.vision=null", *RUN, *WIDE)
    train_case(recipe(tmp_path, run_dir, *words))
    export_checkpoint(run_dir, folder)
    # Without pictures the template is the model's own, to the byte.
    assert (folder / "chat_template.jinja").read_text() == SOURCES[style]
    asked = [{"text": "What is it?", "pictures": [], "system": s} for s in (None, "the mat")]
    ((prompts, answers, _),) = run_ranks(1, _ask, run_dir, asked)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for each, prompt in zip(asked, prompts, strict=True):
        turns = [] if each["system"] is None else [said("system", str(each["system"]))]
        turns.append(said("user", "What is it?"))
        found = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        expected, _ = of_transformers(style, turns, add_generation_prompt=True)
        assert prompt == found["input_ids"] == expected
    assert tokenizer.eos_token == ENDS[style]
    # The command asks alike; the built-in format is there on demand.
    words = ("--checkpoint", str(run_dir), "--prompt", "What is it?", "--max-new-tokens", "6")
    commands = [
        (*words, "--system", "the mat"),
        (*words, "--chat-template", str(write_model(tmp_path / "model", style))),
        (*words, "--chat-template", "built-in", "--thinking", "on"),
    ]
    said_there = [run_ranks(1, _command, ["generate", *command])[0] for command in commands]
    assert [code for code, _ in said_there] == [0, 0, 0]
    assert [out for _, out in said_there[:2]] == [f"{answer}\n" for answer in answers[::-1]]
    if style == "llama":
        code, said_wrong = run_ranks(1, _command, ["generate", *words, "--thinking", "off"])[0]
        assert code == 2 and said_wrong.count("\n") == 1
        assert "thinking off: " in said_wrong and "asks for an answer alike" in said_wrong


def _command(_: World, words: list[str]) -> tuple[int, str]:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(words)
    return code, out.getvalue()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_release_is_verified_in_its_own_format(tmp_path: Path) -> None:
    data = data_set(tmp_path, "qwen")
    run_dir, folder = tmp_path / "run", tmp_path / "released"
    train_case(recipe(tmp_path, run_dir, f"data.train={data}", *RUN, *WIDE))
    words = ("--every-tokens", "1", "--licence", "apache-2.0", "--name", "nano")
    code, out, err = released(run_dir, folder, *words)
    assert code == 0, out + err
    (template,) = folder.glob("*/chat_template.jinja")
    assert template.read_text().endswith(SOURCES["qwen"])


@pytest.mark.unit
def test_videos_keep_their_places() -> None:
    turns = [Turn("user", "<image>What <video>?"), Turn("assistant", "a cat")]
    template = ChatTemplate(text_of("llama"), tokenizer_of("llama"))
    parts = template.session_parts([turns], ["video", "image"], video_fps=2.0)
    shown = [part for part in parts if not isinstance(part, Tokens)]
    assert shown[2:6] == [Picture(1), Text("What ", False), Video(0, 2.0), Text("?", False)]


@pytest.mark.unit
def test_an_import_brings_its_template(tmp_path: Path) -> None:
    from megatron_vlm.release.importing import import_folder

    folder = write_model(tmp_path / "model", "llama")
    write_folder(folder, "qwen2")
    found = import_folder(folder, tmp_path / "imported").checkpoint
    assert read_template(found) == text_of("llama")
    # What the documents say to build with.
    assert TemplateText.load(found) == text_of("llama")
    (folder / "chat_template.jinja").unlink()
    assert read_template(import_folder(folder, tmp_path / "without").checkpoint) is None


@pytest.mark.unit
def test_which_of_several_formats(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen")
    source = write_conversations(tmp_path / "source", CONVERSATIONS[:1])
    text = tmp_path / "a.txt"
    text.write_text("a document")
    for name, path, template in (
        ("templated", source, text_of("qwen")),
        ("again", source, text_of("qwen")),
        ("plain", source, None),
        ("documents", text, None),
    ):
        build_dataset(path, tmp_path / name, tokenizer=tokenizer, template=template, workers=1)

    def chosen(*names: str, start: Path | None = None, **data: str) -> TemplateText | None:
        words = [f"data.train.{name}={tmp_path / name}" for name in names]
        words += [f"data.{key}={value}" for key, value in data.items()]
        config = load_recipe("tests/nano.yaml", ["model.vision=null", *WIDE, *words])
        return chat_template(config, open_training_data(config), start)

    assert chosen("templated", "again", "documents") == text_of("qwen")
    assert chosen("plain", "documents") is None
    with pytest.raises(ConfigError, match=r"plain and data\.train\.templated have .* different"):
        chosen("templated", "plain")
    assert chosen("templated", "plain", chat_source="templated") == text_of("qwen")
    assert chosen("templated", "plain", chat_source="plain") is None
    with pytest.raises(ConfigError, match="documents: holds documents, .* dialogues .templated"):
        chosen("templated", "documents", chat_source="documents")
    with pytest.raises(ConfigError, match="chat_source names 'other'; expected a source of train"):
        chosen("templated", chat_source="other")
    # Of documents alone, a run keeps what it starts from.
    assert chosen("documents") is None
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "chat_template.json").write_text(text_of("qwen").to_json())
    assert chosen("documents", start=tmp_path / "start") == text_of("qwen")
    assert chosen("plain", start=tmp_path / "start") is None


@pytest.mark.unit
def test_prompts_of_the_built_in_format(tmp_path: Path) -> None:
    from megatron_vlm.data.chat import ThinkingSettings, encode_prompt

    tokenizer: Tokenizer = tokenizer_of("qwen")
    prompts = ThinkingSettings()
    for thinks, opening in (
        (None, "the mat"),
        (True, f"{prompts.thinking_prompt}\n\nthe mat"),
        (False, f"{prompts.plain_prompt}\n\nthe mat"),
    ):
        expected, _ = encode_conversation(
            tokenizer, [("system", opening), ("user", "What?"), ("assistant", "a cat")], 1
        )
        found = encode_prompt(tokenizer, "What?", 1, system="the mat", thinks=thinks)
        answer = tokenizer.encode("a cat")
        assert [*found, *answer, tokenizer.special("end"), tokenizer.eos_id] == expected
    found = encode_prompt(tokenizer, "What?", 0, thinks=False)
    turns: Any = [("system", prompts.plain_prompt), ("user", "What?"), ("assistant", "")]
    assert found == encode_conversation(tokenizer, turns, 0)[0][:-2]
