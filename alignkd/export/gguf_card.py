"""README.md of a GGUF export: the model's own card, and how to run the two files."""

from __future__ import annotations

from pathlib import Path

CLASS_TOKEN = {
    True: """\
`mmproj.gguf` keeps the class token of the vision tower. llama.cpp releases since spring 2025 place it behind
the patches (llama.cpp issue 25814), which shifts every patch to its neighbour's position and drops the first
one; answers about images suffer until that is fixed.""",
    False: """\
`mmproj.gguf` leaves out the class token of the vision tower, because llama.cpp releases since spring 2025
place it behind the patches (llama.cpp issue 25814). Patches do not attend to it, as they did in training; how
much that costs has not been measured on published weights. `--class-token` writes the full tower.""",
}


def gguf_card(model: Path, name: str, quantize: str, *, class_token: bool) -> str:
    """``model``: the MobileVLM folder that is written; its README.md, where it has one, comes first."""
    own = model / "README.md"
    first = own.read_text(encoding="utf-8") if own.is_file() else f"# {name}\n"
    return f"""{first}
## GGUF

`text.gguf` ({quantize}) and `mmproj.gguf` (f16) are this model for llama.cpp:

```sh
llama-mtmd-cli --jinja -m text.gguf --mmproj mmproj.gguf --image picture.jpg --temp 0 -p "What is this?"
```

The chat template is in `text.gguf`. Smaller K-quants need llama.cpp's own tool, on an export with
`--quantize f16`: `llama-quantize text.gguf text-q4_k_m.gguf Q4_K_M`.

{CLASS_TOKEN[class_token]}

llama.cpp pads and resizes pictures with its own code; pixels differ slightly from those in training.
"""
