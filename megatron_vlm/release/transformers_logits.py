"""A script of its own: the logits of a released folder, where only transformers is.

    python -P transformers_logits.py REQUEST RESULT

It is run by its path and imports nothing of this package; importing that or the engine fails in
it, as it will where the folder is loaded. REQUEST is JSON: the folder, rows of token ids of equal
length, and a question with a picture's file (or none). RESULT is safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ABSENT = ("megatron", "megatron_vlm", "mvlm_kernels")


class _Absent:
    """A finder that comes first and finds nothing of ours."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse, as if the module were not installed."""
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(request: str, result: str) -> None:
    """Load the folder, compute and write."""
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    asked = json.loads(Path(request).read_text())
    folder, text, picture = asked["folder"], asked["question"], asked["picture"]
    speaker: Any
    auto: Any = AutoModelForCausalLM
    content: Any = text
    code: dict[str, Any] = {}
    if picture is None:
        speaker = AutoTokenizer.from_pretrained(folder)
    else:
        code = {"trust_remote_code": True}
        speaker = AutoProcessor.from_pretrained(folder, **code)
        auto = AutoModelForImageTextToText
        content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    model, loading = auto.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **code
    )
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if loading.get(kind):
            raise SystemExit(f"{kind} while loading: {sorted(map(str, loading[kind]))[:3]}")
    model.eval()
    inputs = speaker.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        rows = model(input_ids=torch.tensor(asked["rows"]), use_cache=False).logits
        answer = model(**inputs, use_cache=False).logits
    found = {"rows": rows, "question": answer[0], "question_ids": inputs["input_ids"][0]}
    save_file(
        {name: value.contiguous() for name, value in found.items()},
        result,
        metadata={"transformers": transformers.__version__},
    )


if __name__ == "__main__":
    sys.meta_path.insert(0, _Absent())
    main(*sys.argv[1:])
