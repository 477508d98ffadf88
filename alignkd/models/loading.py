"""Build a model in its dtype and load its weights from a folder, whole or sharded by ZeRO-3.

Tensors on disk have the published names (``model.layers.0...``, ``lm_head.weight``); :func:`public_name` maps
ours to them. A missing, unexpected or mis-shaped tensor is never passed over: all of them are listed in one
error.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import LlamaModel
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from alignkd.config.schema import ModelSection
from alignkd.errors import CheckpointError
from alignkd.models.agreement import student_folder, student_model_config
from alignkd.models.configuration import MobileVLMConfig, read_model_config
from alignkd.models.mobilevlm import LanguageModelHead, MobileVLM, llama_config, new_projector
from alignkd.models.weight_files import WeightFiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."
PREFIXES = {  # ours -> published; the first match counts
    "vision_tower.": TOWER_PREFIX,
    "projector.": PROJECTOR_PREFIX,
    "head.": "lm_head.",
    "language_model.": "model.",
}
OLD_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|position_ids)$")  # saved by old releases, recomputed here


@dataclass(frozen=True)
class BuildOptions:
    """In which dtype and where a model is built."""

    dtype: torch.dtype
    device: torch.device | str = "cpu"  # of a sharded model: of its buffers
    zero3: dict[str, Any] | None = None  # DeepSpeed configuration that shards it, and places the shards
    group: Any = None  # process group that shares one set of shards; None: all ranks


def public_name(name: str) -> str:
    for ours, published in PREFIXES.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    raise AssertionError(f"no published name for {name}")


def load_model(folder: Path | str, options: BuildOptions) -> MobileVLM:
    """Load a complete MobileVLM folder. Raises CheckpointError listing every tensor that does not fit."""
    config = read_model_config(folder)
    files = WeightFiles(Path(folder))
    model = _empty_model(config, options)
    _fill(model, dict.fromkeys(files.names(), files.read), files.shape, options, str(folder))
    restore_buffers(model, options.device)
    return model


def model_of_tensors(
    config: MobileVLMConfig, tensors: Mapping[str, torch.Tensor], options: BuildOptions, where: str
) -> MobileVLM:
    """The same from tensors with published names; ``where`` they come from begins the error."""
    model = _empty_model(config, options)
    sources = dict.fromkeys(tensors, tensors.__getitem__)
    _fill(model, sources, lambda name: tuple(tensors[name].shape), options, where)
    restore_buffers(model, options.device)
    return model


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
    _fill(model, sources, shapes.__getitem__, options, where)
    restore_buffers(model, options.device)
    return model, completed


def restore_buffers(model: MobileVLM, device: torch.device | str) -> None:
    """Recompute the buffers in their own dtypes. ``zero.Init`` and DeepSpeed's engines cast the rotary
    frequencies to the model's half precision, after which positions drift silently: call this after each."""
    rotary = model.language_model.rotary_emb
    with torch.device("cpu"):
        fresh = LlamaRotaryEmbedding(llama_config(model.config))
    rotary.inv_freq = fresh.inv_freq.to(device)
    rotary.original_inv_freq = fresh.original_inv_freq.to(device)
    embeddings = model.vision_tower.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]


def full_tensors(model: nn.Module, *, only_frozen: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of every parameter; gathers ZeRO-3 shards one by one. Collective."""
    for name, parameter in model.named_parameters():
        if only_frozen and parameter.requires_grad:
            continue
        with _gathered(parameter):
            yield name, parameter.data


def fingerprint(model: MobileVLM, *, hashing: bool = True) -> str:
    """sha256 over published names, shapes and bytes: equal for a sharded and a whole model. Collective under
    ZeRO-3."""
    return _hash(((public_name(name), value) for name, value in full_tensors(model)), hashing)


def tower_fingerprint(model: MobileVLM, *, hashing: bool = True) -> str:
    """The same over the parts of the vision tower that are used, under their own names."""
    parts = enumerate(model.used_tower_modules())
    tensors = ((f"{number}.{name}", value) for number, part in parts for name, value in full_tensors(part))
    return _hash(tensors, hashing)


def frozen_fingerprint(module: nn.Module, *, hashing: bool = True) -> str:
    """The same over what training does not change: frozen parameters and all buffers, under our names."""
    frozen = full_tensors(module, only_frozen=True)
    return _hash(itertools.chain(frozen, module.named_buffers()), hashing)


def _hash(tensors: Iterable[tuple[str, torch.Tensor]], hashing: bool) -> str:
    digests = {}
    for name, value in tensors:
        if not hashing:
            continue
        data = value.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tuple(data.shape)} {data.dtype}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
        digests[name] = digest.hexdigest()
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def _empty_model(config: MobileVLMConfig, options: BuildOptions) -> MobileVLM:
    if options.zero3 is not None:
        # The dtype comes from the configuration's bf16 or fp16 section (fp32 without one). An explicit one is
        # ignored by DeepSpeed 0.19.8 where fp16 is not supported: on a CPU it would silently build a bf16
        # teacher instead of an fp32 one.
        sharded = deepspeed.zero.Init(data_parallel_group=options.group, config_dict_or_path=options.zero3)
        with sharded, no_init_weights():
            model = MobileVLM(config)
        built = model.head.weight.dtype
        assert built == options.dtype, f"ZeRO-3 built {built}, wanted {options.dtype}"
        return model
    with torch.device("meta"), no_init_weights():
        model = MobileVLM(config).to(options.dtype)
    return model.to_empty(device=options.device)


def _fill(
    model: MobileVLM,
    sources: Mapping[str, Callable[[str], torch.Tensor]],
    shape_of: Callable[[str], tuple[int, ...]],
    options: BuildOptions,
    where: str,
) -> None:
    parameters = {public_name(name): parameter for name, parameter in model.named_parameters()}
    _check_shapes(parameters, sources, shape_of, where)
    # Under ZeRO-3 only the first rank of the group reads; the others receive their shards from it.
    for name in [name for name in sources if name in parameters]:
        parameter = parameters[name]
        with _gathered(parameter, modifier_rank=0):
            if options.zero3 is None or torch.distributed.get_rank(options.group) == 0:
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


@contextmanager
def _gathered(parameter: nn.Parameter, modifier_rank: int | None = None) -> Iterator[None]:
    if not hasattr(parameter, "ds_id"):
        yield
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank):
        yield


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
