"""LoRA students (arXiv 2106.09685), by peft: low-rank adapters beside the frozen language model.

Every linear layer of the language model but its head gets one: ``W x + alpha / rank * B A x``, with A random
and B zero at first. In the engine they lie in peft's modules, under its names; files hold either the model
with its adapters merged or, in a folder that peft loads, the adapters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from alignkd.config.schema import LoraSection
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.models.saving import write_tensors

BASE = ".base_layer."
LOW_RANK = (".lora_A.default.weight", ".lora_B.default.weight")


def add_lora(model: VisionLanguageModel, lora: LoraSection, seed: int) -> None:
    """Freeze the language model and put adapters beside it, seeded alike on every rank. The other parts keep
    what they are trained for."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and model.part_of(f"{name}.weight") == "language_model"
    ]
    others = {
        name: parameter.requires_grad
        for name, parameter in model.named_parameters()
        if model.part_of(name) != "language_model"
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=layers), model)
    for name, parameter in model.named_parameters():
        if name in others:
            parameter.requires_grad_(others[name])


def merged(tensors: Mapping[str, torch.Tensor], lora: LoraSection) -> dict[str, torch.Tensor]:
    """The model's own tensors, under the names that they have without adapters, with these added. The sum is
    made in fp32, and rounded once to the dtype of the weight."""
    found = {}
    for name, value in tensors.items():
        if name.endswith(LOW_RANK):
            continue
        if name.endswith(f"{BASE}weight"):
            down, up = (tensors[name.removesuffix(f"{BASE}weight") + end].float() for end in LOW_RANK)
            value = (value.float() + lora.alpha / lora.rank * (up @ down)).to(value.dtype)
        found[name.replace(BASE, ".")] = value
    return found


def write_adapters(
    out: Path,
    base: str,
    lora: LoraSection,
    tensors: Mapping[str, torch.Tensor],
    public_name: Callable[[str], str],
) -> None:
    """A folder for ``PeftModel.from_pretrained(model of base, out)``. ``tensors`` of the whole model have our
    names, which ``public_name`` translates."""
    from peft import LoraConfig

    found, layers = {}, []
    for name, value in tensors.items():
        for end in LOW_RANK:
            if name.endswith(end):
                layer = public_name(name.removesuffix(end))
                found[f"base_model.model.{layer}{end.replace('.default', '')}"] = value
                layers.append(layer)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=sorted(set(layers)),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(out))
    write_tensors(found, out / "adapter_model.safetensors")
