"""What the documents say is true: files, names, commands, keys, layouts, metrics, the example."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import tomllib
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_vlm.cli.main import COMMANDS, _parse, _subcommand_parser, subcommand_module
from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.config.messages import known_keys
from megatron_vlm.config.schema import ParallelConfig, VisionParallelConfig
from megatron_vlm.data.pdf.settings import PdfSettings
from tests.parallel.layouts import LAYOUTS
from tests.training_case import Outcome, recipe, train_case

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_vlm"
ROOMS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
PLACES = ROOMS | {"megatron_vlm", "tests", "docs", "configs", "benchmarks"}
ROOT_FILES = {"pyproject.toml", "setup.py", "constraints.txt", "Makefile"}
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], key=lambda path: path.name.lower()
)

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def prose(path: Path) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def code(path: Path) -> list[str]:
    """What stands in single backticks."""
    text = prose(path)
    for line in text.splitlines():
        assert line.count("`") % 2 == 0, f"{path.name}: code goes over the end of a line: {line}"
    return re.findall(r"`([^`]+)`", text)


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def table(path: Path, head: str) -> list[list[str]]:
    """The cells below a table's head, given as its first cell."""
    rows, inside = [], False
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0] == head:
            inside = True
        elif inside and not cells:
            break
        elif inside and set(cells[0]) - set("-"):
            rows.append(cells)
    assert rows, f"{path.name} has no table headed {head}"
    return rows


def defined(file: Path) -> set[str]:
    """Names defined by a file: at its top, and in its classes as `Class.name`."""
    names: set[str] = set()

    def add(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign):
                names.update(prefix + ast.unparse(target) for target in node.targets)
            elif isinstance(node, ast.AnnAssign):
                names.add(prefix + ast.unparse(node.target))

    add(ast.parse(file.read_text()).body, "")
    return names


def anchors(path: Path) -> set[str]:
    """Fragments that the headings of a document can be linked by."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def parser_of(command: str) -> argparse.ArgumentParser:
    return _subcommand_parser(command, subcommand_module(command))


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of a parser and of those nested in it."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for nested in action.choices.values():
                found |= options(nested)
    return found


@pytest.mark.unit
@documents
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{path.name} links to {target}"


@pytest.mark.unit
@documents
def test_files_exist(path: Path) -> None:
    for text in code(path):
        first = text.split("/")[0]
        if "NAME" in text:
            continue
        if re.fullmatch(r"[\w.-]+(/[\w.-]*)+", text) and first in PLACES:
            assert (ROOT / text).exists() or (PACKAGE / text).exists(), text
        elif text in ROOT_FILES:
            assert (ROOT / text).is_file(), text


@pytest.mark.unit
@documents
def test_names_are_defined_where_it_is_said(path: Path) -> None:
    found = re.findall(r"`([\w.]+)`\s+\(`([\w/]+\.py)`\)", prose(path))
    for name, file in found:
        assert name in defined(PACKAGE / file), f"{path.name}: {name} ({file})"
    if path.name == "architecture.md":
        assert len(found) > 40


@pytest.mark.unit
@documents
def test_keys_are_in_the_schema(path: Path) -> None:
    keys = set(known_keys(RunConfig))
    sections = "|".join(RunConfig.model_fields)
    for text in code(path):
        # `optimizer.exp_avg.PARAMETER` is a tensor of a checkpoint.
        match = re.fullmatch(rf"((?:{sections})\.[\w.]+)(=.*)?", text)
        if match and not match[1].endswith(".PARAMETER"):
            assert match[1].removesuffix(".NAME") in keys, f"{path.name}: {text}"


@pytest.mark.unit
@documents
def test_commands_in_prose(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = set().union(*(options(parser_of(name)) for name in COMMANDS))
    for words in (text.split() for text in code(path)):
        if words[0].startswith("--"):
            assert words[0] in known, f"{path.name}: {' '.join(words)}"
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets, f"{path.name}: {' '.join(words)}"
        if words[0] == "mvlm" and len(words) > 1 and not words[1].isupper():
            assert words[1] in COMMANDS, f"{path.name}: {' '.join(words)}"
            wrong = {word for word in words if word.startswith("--")} - options(parser_of(words[1]))
            assert not wrong, f"{path.name}: {' '.join(words)}"


@pytest.mark.unit
@documents
def test_commands_in_blocks_parse(path: Path) -> None:
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["mvlm"]:
                args = _parse(parser_of(words[1]), words[2:])
                if hasattr(args, "recipe"):
                    # What an import writes is not here.
                    there = [word for word in args.overrides if not word.endswith("/model.yaml")]
                    load_recipe(args.recipe, there)


@pytest.mark.unit
def test_every_command_and_document_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for name in COMMANDS:
        assert f"| `mvlm {name}" in text
    for document in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{document.name})" in text


@pytest.mark.unit
def test_layouts_are_those_that_are_tested() -> None:
    path = ROOT / "docs/parallelism.md"
    said = {}
    for name, processes, _ in table(path, "Layout"):
        said[name.split("`")[1]] = (int(processes), name.endswith("*"))
    assert said == {name: (case.world_size, case.quick) for name, case in LAYOUTS.items()}
    sizes: dict[str, set[int]] = {}
    for case in LAYOUTS.values():
        given = dict(word.removeprefix("parallel.").split("=") for word in case.overrides)
        rest = case.world_size
        for key in ("tensor_model", "pipeline_model", "context"):
            rest //= int(given.get(f"{key}_parallel_size", 1))
        for key, size in {**given, "data": str(rest)}.items():
            if size.isdigit() and size != "1":
                sizes.setdefault(key, set()).add(int(size))
    for _, keys, name, proven in table(ROOT / "README.md", "What is split"):
        named = re.findall(r"`(\w+)`", keys) or ["data"]
        assert set(named) <= {*ParallelConfig.model_fields, "data"}
        if name not in ("", "overlap"):
            assert set(map(int, re.findall(r"\d+", proven))) == sizes[named[0]], name
    defaults = {row[0].strip("`"): row[1] for row in table(path, "Key")}
    sections = {"parallel": ParallelConfig, "vision_parallel": VisionParallelConfig}
    assert defaults == {
        f"{section}.{name}": {None: "null", False: "false"}.get(field.default, str(field.default))
        for section, config in sections.items()
        for name, field in config.model_fields.items()
    }


@pytest.mark.unit
def test_settings_of_pdf_files_are_those_of_the_table() -> None:
    said = {row[0].strip("`"): row[1] for row in table(ROOT / "docs/data.md", "`--pdf-setting`")}
    defaults = {name: f"{value}" for name, value in asdict(PdfSettings()).items()}
    assert said == {**defaults, "longest_side": "none"}


@pytest.mark.unit
def test_floors_are_those_that_are_enforced() -> None:
    rows = table(ROOT / "docs/architecture.md", "Floor")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (each["layers"] for each in contracts["contracts"] if each["type"] == "layers")
    assert [set(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows] == [
        set(re.findall(r"\w+", layer)) for layer in layers
    ]
    assert [int(floor) for floor, _ in rows] == list(reversed(range(len(rows))))


@pytest.mark.unit
def test_drawing_is_whole() -> None:
    tree = ElementTree.parse(ROOT / "docs/images/step.svg")
    ids = {node.get("id") for node in tree.iter()} - {None}
    for node in tree.iter():
        for value in (node.get("href", ""), node.get("marker-end", "")):
            if reference := re.search(r"#([\w-]+)", value):
                assert reference[1] in ids


@pytest.mark.distributed
def test_metrics_are_those_of_the_table(nano_data: Path, tmp_path: Path) -> None:
    words = ("training.train_iters=2", "vision_parallel.cost=measured",
             "training.timeline_interval=2")  # fmt: skip
    run = train_case(recipe(nano_data, tmp_path, *words))
    path = ROOT / "docs/architecture.md"
    said = {row[0].strip("`") for row in table(path, "Key of `metrics.jsonl`")}
    assert {key.replace("held_out", "NAME") for key in run.metrics[-1]} == said
    left = {path.name for path in tmp_path.iterdir()}
    rows = table(path, "In `run_dir`")
    assert left == {row[0].strip("`").split("/")[0] for row in rows}


@pytest.mark.distributed
def test_example_objective_is_alike_in_every_layout(nano_data: Path, tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs/objectives.md", "python")
    file = tmp_path / "sample_mean.py"
    file.write_text(block)
    spec = importlib.util.spec_from_file_location("sample_mean", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The ranks are forks: what is registered here, they know.
    spec.loader.exec_module(module)

    def run(name: str, world_size: int, *overrides: str) -> Outcome:
        words = ("training.objective=sample_mean", "training.train_iters=3", *overrides)
        return train_case(recipe(nano_data, tmp_path / name, *words), world_size)

    one = run("one", 1)
    assert all(0 < entry["sample_loss"] < 10 for entry in one.metrics)
    for name, key in (("cp", "context_parallel_size"), ("tp", "tensor_model_parallel_size")):
        split = run(name, 2, f"parallel.{key}=2")
        for mine, theirs in zip(split.metrics, one.metrics, strict=True):
            for metric in ("sample_loss", "grad_norm"):
                assert mine[metric] == pytest.approx(theirs[metric], rel=1e-11), (name, metric)
        final = "validation_loss"
        assert split.metrics[-1][final] == pytest.approx(one.metrics[-1][final], rel=1e-11)
