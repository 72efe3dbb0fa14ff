"""The model card of a release: README.md, from what `training_state.json` says and nothing else."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from megatron_vlm.release import curve
from megatron_vlm.release.licences import OTHER, front_matter
from megatron_vlm.release.words import bytes_in_words, count_in_words

FILE = "README.md"
CONFIG_FILE = "training_config.yaml"
STATE_FILE = "training_state.json"
SUMS_FILE = "SHA256SUMS"
CHECKPOINT_FOLDER = "checkpoint"

AS_TRAINED = "as trained"
"""Of weights that are in the files as the trainer computed with them."""
LEAST_TRANSFORMERS = "5.10"

_UNKNOWN = "not known"


def model_card(facts: dict[str, Any]) -> str:
    """Markdown with front matter that the hub reads."""
    sees = facts["model"]["vision"] is not None
    parts = [
        _header(facts, sees),
        f"# {facts['release']}\n\n{_opening(facts, sees)}",
        _point(facts, sees),
        _losses(facts),
        _data(facts),
        _model(facts, sees),
        _trained_with(facts),
        _loading(facts, sees),
        _continuing(facts),
        _files(facts),
        f"## Licence\n\n{_licence(facts)}",
    ]
    return "\n\n".join(parts) + "\n"


def header(values: dict[str, Any]) -> str:
    """YAML front matter."""
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def number(value: float | None, form: str = ",") -> str:
    """A number, or that there is none."""
    return _UNKNOWN if value is None else format(value, form)


def _header(facts: dict[str, Any], sees: bool) -> str:
    tags = ["megatron-vlm", "intermediate-checkpoint"]
    if facts["model"]["language"]["num_moe_experts"]:
        tags.append("mixture-of-experts")
    if sees:
        tags += ["vision-language", "custom_code"]
    return header(
        {
            **front_matter(facts["licence"]),
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text" if sees else "text-generation",
            "tags": tags,
            **({"base_model": facts["base_model"]} if facts["base_model"] else {}),
        }
    )


def _opening(facts: dict[str, Any], sees: bool) -> str:
    kind = "vision-language model" if sees else "language model"
    tokens = facts["consumed"]["tokens"]
    text = (
        f"An intermediate checkpoint of the {kind} {_text(facts['name'])}, after "
        f"**{count_in_words(tokens)} tokens** ({tokens:,} exactly), iteration "
        f"{facts['iteration']:,} of {facts['train_iters']:,} planned{_counted(facts)}."
    )
    if facts["base_model"]:
        text += f" Base model: {_text(facts['base_model'])}."
    if facts["started_from"]:
        kept = "with" if facts["started_with_optimizer"] else "without"
        text += f" The run started from {_text(facts['started_from'])}, {kept} its optimizer."
    ahead = bool(facts["model"]["language"]["mtp_num_layers"])
    return f"{text}\n\n{_verified(facts['verification'], facts['export'], ahead)}"


def _counted(facts: dict[str, Any]) -> str:
    """Whose tokens and steps are counted, where the weights have seen more than those."""
    return " in this run" * bool(facts["started_from"] and not facts["started_with_optimizer"])


def _verified(verification: dict[str, Any] | None, export: dict[str, Any], ahead: bool) -> str:
    """In words; `ahead`: whether there are layers of multi-token prediction."""
    if verification is None:
        return "**Not verified**: nobody has compared this folder with the checkpoint's own logits."
    left = verification["positions"] - verification["compared"]
    text = (
        "**Verified**: max relative difference "
        f"{verification['max_relative_difference']:.1e} between the logits of this folder in "
        f"transformers {verification['transformers']} and those of the trainer "
        f"{_with_weights(export)}, computed in float32, at "
        f"{verification['compared']} positions of {verification['prompts']} prompts"
    )
    if verification["pictures"]:
        text += f" (pictures: {verification['pictures']})"
    if left:
        text += (
            f"; {left} more were left out, where the choice of an expert was too close for float32"
        )
    text += "."
    if ahead:
        text += (
            " These logits are the next token's: the layer of multi-token prediction, which "
            "transformers loads apart from the model, was not compared."
        )
    return text


def _with_weights(export: dict[str, Any]) -> str:
    """With which weights the trainer was compared."""
    if export["weights"] == AS_TRAINED:
        return "with the same weights"
    return f"with these same weights ({export['dtype']}, {export['weights']})"


def _point(facts: dict[str, Any], sees: bool) -> str:
    consumed, batch, rate = facts["consumed"], facts["batch"], facts["learning_rate"]
    mean, run = batch["tokens_mean"], _counted(facts)
    rows = {
        "Stage": _text(facts["stage"]) if facts["stage"] else "not named",
        f"Tokens seen{run}": f"{consumed['tokens']:,}, without padding"
        + ", those of pictures included" * sees,
        f"Documents seen{run}": number(consumed["documents"]) + _passes(facts),
        f"Packed rows seen{run}": number(consumed["rows"]),
        "Iteration": f"{facts['iteration']:,}",
        "Steps skipped": number(consumed["skipped_iterations"]),
        "Learning rate": f"{rate['value']:.6g} (from {rate['from']})",
        "Schedule": rate["in_words"],
        "Batch": f"{batch['rows']:,} row{'s' * (batch['rows'] != 1)} at every step (no ramp), "
        f"{batch['tokens_at_most']:,} tokens at most"
        + (f", {mean:,.0f} on average" if mean is not None else ""),
        "Row length": f"{batch['seq_length']:,} tokens",
        "Objective": _text(facts["objective"]),
        "Frozen parts": ", ".join(facts["frozen"]) or "none",
    }
    return f"## Where training stands\n\n{_table(('', ''), rows.items())}"


def _passes(facts: dict[str, Any]) -> str:
    """How often the training set was seen, where that is known: of a mixture, it is not."""
    sets = facts["data"]["train"]
    seen, samples = facts["consumed"]["documents"], sets[0]["samples"] if len(sets) == 1 else None
    return f", {seen / samples:,.2f} times the training set" if seen and samples else ""


def told_once(validation: dict[str, Any]) -> dict[str, Any]:
    """Validation metrics by name without the mean over all sets where there is one set."""
    sets = [name for name in validation if name.startswith("validation_loss_")]
    return {k: v for k, v in validation.items() if k != "validation_loss" or len(sets) != 1}


def _losses(facts: dict[str, Any]) -> str:
    losses = facts["losses"]
    rows = [
        (f"{_text(name)}, training", _loss(value), f"{facts['iteration']:,}")
        for name, value in losses["training"].items()
    ]
    rows += [
        (_text(name), _loss(entry["value"]), f"{entry['iteration']:,}")
        for name, entry in told_once(losses["validation"]).items()
    ]
    if not rows:
        why = "metrics.jsonl says nothing of this step"
        if not losses["metrics_found"]:
            why = "the run's metrics.jsonl was not there"
        body = f"Not known: {why}."
    else:
        body = _table(("Loss", "Value", "At iteration"), rows)
        if not losses["training"]:
            body += "\n\nThe training loss is not known: metrics.jsonl says nothing of this step."
        if not losses["validation"]:
            body += "\n\nNo held-out set was evaluated up to here."
    if rows:
        body += (
            "\n\nIn nats per target token; a load balancing loss is 1 where experts are balanced."
        )
    if rows and facts["export"]["weights"] != AS_TRAINED:
        body += (
            " Measured in training, with its own weights; those in these files are "
            f"{facts['export']['dtype']}, {facts['export']['weights']}."
        )
    if curve.FILE in facts["files"]:
        body += f"\n\n![Loss over tokens, this point marked]({curve.FILE})"
    return f"## Losses\n\n{body}"


def _data(facts: dict[str, Any]) -> str:
    train = facts["data"]["train"]
    sets = [
        ("training" if len(train) == 1 else f"training: {each['source']}", each) for each in train
    ]
    sets += [(f"held out: {name}", each) for name, each in facts["data"]["validation"].items()]
    rows = [
        (
            _text(role),
            _text(each["name"] or _UNKNOWN),
            number(each["samples"]),
            number(each["pictures"]),
            number(each["text_tokens"]),
            _text(each["licence"] or "not told"),
            f"`{(each['content_sha256'] or _UNKNOWN)[:16]}`",
        )
        for role, each in sets
    ]
    head = ("Use", "Set", "Documents", "Pictures", "Text tokens", "Licence", "SHA-256 of content")
    return f"## Data\n\n{_table(head, rows)}\n\nWhole digests are in `{STATE_FILE}`."


def _model(facts: dict[str, Any], sees: bool) -> str:
    model, counts = facts["model"], facts["model"]["parameters"]
    language, vision = model["language"], model["vision"]
    rows = {
        "Class": f"`{facts['export']['architecture']}`",
        "Parameters, total": f"{count_in_words(counts['total'])} ({counts['total']:,})",
        "Parameters of the decoder": f"{counts['decoder_and_experts']:,}",
        "of these active for a token": f"{counts['decoder_active']:,}",
        "Layers": f"{language['num_layers']}",
        "Width": f"{language['hidden_size']:,}",
        "Attention heads": _heads(language),
        "Vocabulary": f"{language['vocab_size']:,}",
        "Positions": f"{language['max_position_embeddings']:,} at most; trained here on rows of "
        f"{facts['batch']['seq_length']:,} tokens",
    }
    if language["num_moe_experts"]:
        shared = language["moe_shared_expert_intermediate_size"]
        rows["Experts"] = (
            f"{language['num_moe_experts']} of width {language['moe_ffn_hidden_size']:,}, "
            f"{language['moe_router_topk']} a token"
            + (f"; shared ones of width {shared:,}" if shared else "")
        )
    if sees:
        rows |= {
            "Parameters of the encoder": f"{counts['encoder']:,}",
            "Parameters of the adapter": f"{counts['adapter']:,}",
            "Encoder": f"{vision['num_layers']} layers, width {vision['hidden_size']:,}, "
            f"patches of {vision['patch_size']} pixels",
        }
    return f"## Model\n\n{_table(('', ''), rows.items())}"


def _heads(language: dict[str, Any]) -> str:
    heads = language["num_attention_heads"]
    groups = language["num_query_groups"] or heads
    return f"{heads}" + (f", {groups} of keys and values" if groups != heads else "")


def _trained_with(facts: dict[str, Any]) -> str:
    settings, layout = facts["optimizer"], facts["layout"]
    rows = {
        "Optimizer": f"AdamW, betas {settings['adam_beta1']:g} and {settings['adam_beta2']:g}, "
        f"epsilon {settings['adam_eps']:g}, weight decay {settings['weight_decay']:g}, "
        f"gradients clipped at {settings['clip_grad']:g}",
        "Precision": _text(facts["precision"] or _UNKNOWN),
        "Seed": str(facts["seed"]),
        "Layout": layout_in_words(layout),
        "Weights in these files": f"{facts['export']['dtype']}, {facts['export']['weights']}, "
        f"{bytes_in_words(facts['export']['bytes'])}",
        **{f"{name}": _text(version) for name, version in facts["versions"].items()},
    }
    return f"## How it was trained\n\n{_table(('', ''), rows.items())}"


def layout_in_words(layout: dict[str, Any]) -> str:
    """The number of processes and the dimensions that were in use."""
    if "world_size" not in layout:
        return _UNKNOWN
    used = [f"{name.upper()} {layout[name]}" for name in _DIMENSIONS if (layout.get(name) or 1) > 1]
    if layout.get("sequence_parallel"):
        used.append("SP")
    count = layout["world_size"]
    return f"{count:,} process{'es' if count > 1 else ''}" + (f": {', '.join(used)}" * bool(used))


_DIMENSIONS = ("tp", "cp", "pp", "vpp", "ep", "etp", "dp")


def _loading(facts: dict[str, Any], sees: bool) -> str:
    code, needs = (_LOAD_VLM, " pillow") if sees else (_LOAD_LM, "")
    revision = facts["release"].removeprefix(f"{facts['name']}-")
    return (
        "## Loading it with transformers\n\n"
        f"```sh\npip install torch 'transformers>={LEAST_TRANSFORMERS}'{needs}\n```\n\n"
        f"```python\n{code}```\n\n"
        f'From the hub, `folder` is `"OWNER/NAME"` of the repository, and each `from_pretrained` '
        f'takes `revision="{revision}"` too.\n\n'
        "Or with megatron-vlm, which trained it (a trainer for vision-language "
        "mixture-of-experts models); `FOLDER` is the folder of this file:\n\n"
        f"```sh\nmvlm import FOLDER checkpoints/{facts['release']}\n```"
    )


_LOAD_VLM = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # the folder of this file
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
content = [
    {"type": "image", "path": "picture.png"},
    {"type": "text", "text": "What is shown?"},
]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
"""

_LOAD_LM = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is a checkpoint?"}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def _continuing(facts: dict[str, Any]) -> str:
    folder, train = facts["release"], facts["data"]["train"]
    names = [shlex.quote(each["name"] or "DATASET") for each in train]
    data = (
        f"data.train={names[0]}"
        if len(train) == 1
        else " ".join(
            shlex.quote(f"data.train.{each['source']}.path") + f"={name}"
            for each, name in zip(train, names, strict=True)
        )
    )
    processes = facts["layout"].get("world_size", 1)
    start = (
        f"mvlm launch FOLDER/{CONFIG_FILE} --nproc {processes} run_dir=runs/continued \\\n"
        f"    {data} data.validation={{}} \\\n"
    )
    rate = f"{facts['learning_rate']['value']:.6g}"
    without = (
        f"```sh\n{start}    checkpoint.load=checkpoints/{folder} "
        "checkpoint.load_optimizer=false\n```\n\n"
        f"after the import above. The moments of AdamW are not in it, so start below the learning "
        f"rate of this point, {rate}, and warm up (`optimizer.lr_warmup_iters`)."
    )
    if not facts["options"]["with_optimizer"]:
        body = f"From the weights alone:\n\n{without}"
    else:
        body = (
            f"`{CHECKPOINT_FOLDER}/` is the whole checkpoint, optimizer and position in the data "
            "included; with the same data training goes on as if it had never stopped, in any "
            f"layout:\n\n```sh\n{start}    checkpoint.load=FOLDER/{CHECKPOINT_FOLDER}\n```\n\n"
            f"From the weights alone, on other data:\n\n{without}"
        )
    return (
        f"## Continuing the training\n\n{body}\n\n`FOLDER` is the folder of this file. "
        f"`{CONFIG_FILE}` holds every setting of the run; "
        "its paths are cut to their last names, so give your own. Set `training.train_iters` and "
        "the layout (`parallel.`) as you need them."
    )


def _files(facts: dict[str, Any]) -> str:
    rows = {
        f"`{STATE_FILE}`": "all of this for programs, with optimizer settings and configuration",
        f"`{CONFIG_FILE}`": "the resolved configuration",
        f"`{SUMS_FILE}`": "`sha256sum -c` checks every file",
    }
    if facts["options"]["with_optimizer"]:
        rows[f"`{CHECKPOINT_FOLDER}/`"] = (
            "the run's own checkpoint with its optimizer, unchanged: its `config.yaml` has the "
            "paths of the machine it was written on"
        )
    return f"## Files beside the model's\n\n{_table(('File', 'What it is'), rows.items())}"


def _licence(facts: dict[str, Any]) -> str:
    licence = facts["licence"]
    if licence is None:
        return "None was given. Without one, nobody is permitted to use these weights."
    if licence == OTHER:
        return "Another one than those with an SPDX identifier; ask whom you got this from."
    return f"{licence} ([text](https://spdx.org/licenses/{licence}.html))."


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _text(value: object) -> str:
    """Text from outside, which may neither leave its cell nor be markup."""
    plain = " ".join(str(value).split())
    for character in "\\`*_<>[]|":
        plain = plain.replace(character, "\\" + character)
    return plain
