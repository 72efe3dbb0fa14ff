"""Run by tests in a process of its own: uses exported folders where only transformers is.

    python outside.py answer FOLDER REQUEST RESULT
    python outside.py example FOLDER SCRIPT
    python outside.py round_trip FOLDER...
    python outside.py resave FOLDER...
    python outside.py processor FOLDER CLASS
    python outside.py chat FOLDER REQUEST RESULT

Importing megatron-core or this package fails here, as where they are not installed.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

ABSENT = ("megatron", "megatron_vlm", "mvlm_kernels")


class _Absent:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def answer(folder: str, request: str, result: str) -> None:
    """Picture features, and greedy answers with the logits of every step."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    asked = json.loads(Path(request).read_text())
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    found: dict[str, Any] = {
        "loading": {name: sorted(keys) for name, keys in loading.items()},
        "dtype": str(model.dtype),
        "classes": [type(part).__name__ for part in (config, model, processor)],
        "answers": [],
    }

    def inputs_of(questions: list[dict[str, Any]]) -> Any:
        messages = []
        for question in questions:
            content = [{"type": "image", "image": file} for file in question["pictures"]]
            content.append({"type": "text", "text": question["text"]})
            messages.append([{"role": "user", "content": content}])
        return processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def generate(inputs: Any, **options: Any) -> Any:
        return model.generate(**inputs, max_new_tokens=asked["max_new_tokens"], **options)

    with torch.no_grad():
        for question in asked["questions"]:
            inputs = inputs_of([question])
            features = None
            if "pixel_values" in inputs:
                features = model.get_image_features(
                    inputs["pixel_values"], inputs["image_grid_thw"]
                )
            out = generate(inputs, return_dict_in_generate=True, output_logits=True)
            length = inputs["input_ids"].shape[1]
            tokens = out.sequences[0, length:]
            found["answers"].append(
                {
                    "prompt": inputs["input_ids"][0].tolist(),
                    "features": features,
                    "logits": torch.cat(out.logits),
                    "tokens": tokens.tolist(),
                    "text": processor.decode(tokens, skip_special_tokens=True),
                    "without_cache": generate(inputs, use_cache=False)[0, length:].tolist(),
                }
            )
        inputs = inputs_of(asked["questions"])
        found["together"] = generate(inputs)[:, inputs["input_ids"].shape[1] :].tolist()
        found["samples"] = generate(inputs, num_beams=2, num_return_sequences=2)[
            :, inputs["input_ids"].shape[1] :
        ].tolist()
        found["beams"] = [
            generate(one, num_beams=2, num_return_sequences=2)[
                :, one["input_ids"].shape[1] :
            ].tolist()
            for one in (inputs_of([question]) for question in asked["questions"])
        ]
        found["refusals"] = []
        broken = inputs_of([asked["questions"][-1]])
        for change in ("more", "none"):
            given = dict(broken)
            if change == "more":
                place = (given["input_ids"] != config.image_token_id).nonzero()[0]
                given["input_ids"] = given["input_ids"].clone()
                given["input_ids"][tuple(place)] = config.image_token_id
            else:
                given.pop("pixel_values")
            try:
                model(**given)
            except ValueError as error:
                found["refusals"].append(str(error))
    torch.save(found, result)


def example(folder: str, script: str) -> None:
    """Run the documents' example, which prints an answer."""
    runpy.run_path(script, init_globals={"folder": folder})


def round_trip(*folders: str) -> None:
    """From random weights to files and back: the same weights, logits, and answers."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    for folder in folders:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, module in model.named_modules():
            if name.startswith("model.") and name.endswith("norm"):
                assert module.variance_epsilon == config.rms_norm_eps, name
        image = config.image_token_id
        inputs = {
            "input_ids": torch.tensor([[1, 2, *[image] * 2, 3, *[image] * 4, 5]]),
            "pixel_values": torch.randn(24, 588),
            "image_grid_thw": torch.tensor([[1, 2, 4], [1, 4, 4]]),
        }
        logits = model(**inputs).logits
        saved = Path(folder) / "saved"
        model.save_pretrained(saved)
        # Checkpoints may also hold a layer of multi-token prediction.
        weights = load_file(saved / "model.safetensors")
        if getattr(config, "num_mtp_layers", 0):
            last = f"model.layers.{config.num_hidden_layers}."
            expert = "model.layers.1.mlp.experts."
            layer = [name for name in weights if name.startswith("model.layers.1.")]
            assert any(name.startswith(expert) for name in layer)
            weights |= {last + name.split(".", 3)[3]: weights[name].clone() for name in layer}
            weights[last + "eh_proj.weight"] = torch.zeros(4, 4)
            save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
        names = {name for name in weights if name.startswith("vision_tower.")}
        for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
            again, loading = auto.from_pretrained(
                saved, trust_remote_code=True, output_loading_info=True
            )
            assert type(again).__name__ == config.architectures[0]
            assert not any(loading.values()), loading
            mine, theirs = model.state_dict(), again.state_dict()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
            assert names == {name for name in mine if name.startswith("vision_tower.")}
            assert torch.equal(again(**inputs).logits, logits)
        # A prompt of text alone, where nothing of the encoder is used.
        text = again.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
        assert text.shape[1] > 3
        kept = json.loads((saved / "config.json").read_text())
        written = json.loads((Path(folder) / "config.json").read_text())
        for name in ("model_type", "architectures", "image_token_id"):
            assert kept[name] == written[name], name
        for name, value in written["vision_config"].items():
            assert kept["vision_config"][name] == value, name


def resave(*folders: str) -> None:
    """Load all of a folder and nothing more, and let transformers write it again."""
    from transformers import AutoModelForImageTextToText

    for folder in folders:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        assert not any(loading.values()), loading
        model.save_pretrained(Path(folder) / "saved")


def processor(folder: str, expected: str) -> None:
    """Load the processor, or what transformers has in the place of one."""
    from transformers import AutoProcessor

    found = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert expected in [kind.__name__ for kind in type(found).__mro__], type(found)


def chat(folder: str, request: str, result: str) -> None:
    """Prompts and answers of questions with a system prompt and a switch of thinking."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    asked = json.loads(Path(request).read_text())
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    found = []
    for question in asked["asked"]:
        content = [{"type": "image", "image": file} for file in question["pictures"]]
        content.append({"type": "text", "text": question["text"]})
        messages = [{"role": "user", "content": content}]
        if question["system"] is not None:
            system = [{"type": "text", "text": question["system"]}]
            messages.insert(0, {"role": "system", "content": system})
        switch = {} if question["thinks"] is None else {"enable_thinking": question["thinks"]}
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **switch,
        )
        out = model.generate(**inputs, max_new_tokens=asked["max_new_tokens"])
        length = inputs["input_ids"].shape[1]
        text = processor.decode(out[0, length:], skip_special_tokens=True)
        found.append({"prompt": inputs["input_ids"][0].tolist(), "text": text})
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    sys.meta_path.insert(0, _Absent())  # type: ignore[arg-type]
    {action.__name__: action for action in (answer, example, round_trip, resave, processor, chat)}[
        sys.argv[1]
    ](*sys.argv[2:])
    assert "torchvision" not in sys.modules
