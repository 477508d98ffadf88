"""Build a MobileVLM in its dtype and load its weights from a folder, whole or sharded by ZeRO-3.

Tensors on disk have the published names (``model.layers.0...``, ``lm_head.weight``); :func:`public_name` maps
ours to them. A missing, unexpected or mis-shaped tensor is never passed over: all of them are listed in one
error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaModel
from transformers.initialization import no_init_weights

from alignkd.config.schema import ModelSection
from alignkd.errors import CheckpointError
from alignkd.models.agreement import student_folder, student_model_config
from alignkd.models.building import (
    BuildOptions,
    check_filled,
    full_tensors,
    gathered,
    hash_tensors,
    reads_weights,
    sharded_construction,
)
from alignkd.models.configuration import MobileVLMConfig, read_model_config
from alignkd.models.families.interface import LanguageModelHead
from alignkd.models.families.mobilevlm import (
    PROJECTOR_PREFIX,
    TOWER_PREFIX,
    MobileVLM,
    llama_config,
    new_projector,
    public_name,
)
from alignkd.models.weight_files import WeightFiles

OLD_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|position_ids)$")  # saved by old releases, recomputed here


def load_model(folder: Path | str, options: BuildOptions) -> MobileVLM:
    """Load a complete MobileVLM folder. Raises CheckpointError listing every tensor that does not fit."""
    config = read_model_config(folder)
    files = WeightFiles(Path(folder))
    model = _empty_model(config, options)
    fill(model, dict.fromkeys(files.names(), files.read), files.shape, options, str(folder))
    model.restore_buffers(options.device)
    return model


def model_of_tensors(
    config: MobileVLMConfig, tensors: Mapping[str, torch.Tensor], options: BuildOptions, where: str
) -> MobileVLM:
    """The same from tensors with published names; ``where`` they come from begins the error."""
    model = _empty_model(config, options)
    sources = dict.fromkeys(tensors, tensors.__getitem__)
    fill(model, sources, lambda name: tuple(tensors[name].shape), options, where)
    model.restore_buffers(options.device)
    return model


def model_around(model: MobileVLM, tensors: Mapping[str, torch.Tensor]) -> MobileVLM:
    """A second set of modules like ``model``, around ``tensors`` (our names), which are not copied. Raises
    CheckpointError when the names are not those of the parameters."""
    with torch.device("meta"), no_init_weights():
        around = MobileVLM(model.config)
    found = around.load_state_dict(tensors, strict=False, assign=True)  # without buffers
    around.restore_buffers(next(iter(tensors.values())).device)
    check_filled(around, found.unexpected_keys)
    return around.requires_grad_(False)


def load_student(section: ModelSection, seed: int, options: BuildOptions) -> tuple[MobileVLM, list[str]]:
    """The model to train: from a MobileVLM folder, from a plain LLaMA folder completed with
    ``model.vision_tower`` and a seeded projector, or from scratch. Also returns the names of the tensors that
    did not come from ``model.student``."""
    config = student_model_config(section)
    sources: dict[str, Callable[[str], torch.Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    if section.student != "scratch":
        files = WeightFiles(Path(section.student))
        sources |= dict.fromkeys(files.names(), files.read)
        shapes |= {name: files.shape(name) for name in files.names()}
    where, completed = str(student_folder(section)), []
    if any(name.startswith((TOWER_PREFIX, PROJECTOR_PREFIX)) for name in sources) and section.vision_tower:
        raise CheckpointError(
            f"model.vision_tower is set, but {section.student} brings its own tower and projector; "
            "remove the key"
        )
    if section.vision_tower is not None:
        where += f", completed with {section.vision_tower}"
        extra = _tower_tensors(Path(section.vision_tower))
        extra |= _initial_tensors(config, seed, only_projector=section.student != "scratch")
        completed = sorted(extra)
        sources |= dict.fromkeys(extra, extra.__getitem__)
        shapes |= {name: tuple(value.shape) for name, value in extra.items()}
    model = _empty_model(config, options)
    fill(model, sources, shapes.__getitem__, options, where)
    model.restore_buffers(options.device)
    return model, completed


def tower_fingerprint(model: MobileVLM, *, hashing: bool = True) -> str:
    """The same over the parts of the vision tower that are used, under their own names."""
    parts = enumerate(model.used_tower_modules())
    tensors = ((f"{number}.{name}", value) for number, part in parts for name, value in full_tensors(part))
    return hash_tensors(tensors, hashing)


def _empty_model(config: MobileVLMConfig, options: BuildOptions) -> MobileVLM:
    if options.zero3 is not None:
        with sharded_construction(options), no_init_weights():
            model = MobileVLM(config)
        built = model.head.weight.dtype
        assert built == options.dtype, f"ZeRO-3 built {built}, wanted {options.dtype}"
        return model
    with torch.device("meta"), no_init_weights():
        model = MobileVLM(config).to(options.dtype)
    return model.to_empty(device=options.device)


def fill(
    model: MobileVLM,
    sources: Mapping[str, Callable[[str], torch.Tensor]],
    shape_of: Callable[[str], tuple[int, ...]],
    options: BuildOptions,
    where: str,
) -> None:
    parameters = {public_name(name): parameter for name, parameter in model.named_parameters()}
    _check_shapes(parameters, sources, shape_of, where)
    for name in [name for name in sources if name in parameters]:
        parameter = parameters[name]
        with gathered(parameter, modifier_rank=0):
            if reads_weights(options):
                parameter.data.copy_(sources[name](name))


def check_tensors(config: MobileVLMConfig, files: WeightFiles) -> None:
    """Raises CheckpointError listing every tensor of a folder that does not fit its configuration."""
    with torch.device("meta"), no_init_weights():
        model = MobileVLM(config)
    parameters = {public_name(name): parameter for name, parameter in model.named_parameters()}
    _check_shapes(parameters, files.names(), files.shape, str(files.folder))


def _check_shapes(
    parameters: Mapping[str, nn.Parameter],
    names: Iterable[str],
    shape_of: Callable[[str], tuple[int, ...]],
    where: str,
) -> None:
    """``parameters`` of the model by published name, ``names`` of the tensors that are there."""
    given = [name for name in names if not OLD_BUFFERS.search(name)]
    problems = [f"missing: {name}" for name in sorted(set(parameters) - set(given))]
    problems += [f"unexpected: {name}" for name in sorted(set(given) - set(parameters))]
    for name in [name for name in given if name in parameters]:  # in the order of the files
        expected = tuple(getattr(parameters[name], "ds_shape", parameters[name].shape))
        if shape_of(name) != expected:
            problems.append(
                f"wrong shape: {name} is {list(shape_of(name))}, the model needs {list(expected)}"
            )
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} tensors do not fit\n  " + "\n  ".join(problems))


def _tower_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tower's tensors under published names, from a CLIP or a MobileVLM folder."""
    files = WeightFiles(folder)
    prefixes = (TOWER_PREFIX, "vision_model.", "")
    names = files.names()
    prefix = next(prefix for prefix in prefixes if any(name.startswith(prefix) for name in names))
    return {
        TOWER_PREFIX + name.removeprefix(prefix): files.read(name)
        for name in names
        if name.startswith(prefix) and not OLD_BUFFERS.search(name)
    }


def _initial_tensors(config: MobileVLMConfig, seed: int, *, only_projector: bool) -> dict[str, torch.Tensor]:
    """Seeded initial values in fp32, the same on every rank, of the projector or of all but the tower.

    LLaMA is initialised by transformers (normal, ``initializer_range``), the projector by PyTorch's default.
    """
    parts: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts["projector"] = new_projector(config)
        if not only_projector:
            parts["language_model"] = LlamaModel(llama_config(config))
            parts["head"] = head = LanguageModelHead(config.hidden_size, config.vocab_size)
            nn.init.normal_(head.weight, std=config.initializer_range)
    return {
        public_name(f"{part}.{name}"): parameter.data
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
    }
