"""Load and save the models of transformers' families, whole or sharded by ZeRO-3. Never code of a folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.initialization import no_init_weights

from alignkd.distributed.failures import describe_failure, error_elsewhere
from alignkd.errors import CheckpointError
from alignkd.models.building import BuildOptions, check_filled, gathered, reads_weights, sharded_construction
from alignkd.models.families.interface import ModelFacts
from alignkd.models.families.processors import LOCAL, read_config
from alignkd.models.families.table import Family
from alignkd.models.families.transformers import (
    PREFIX,
    TransformersModel,
    attention_of_parts,
    attention_with,
    facts_of,
)
from alignkd.models.families.untried import check_untried, found_family

GENERATION = "generation_config.json"


def read_facts(folder: Path) -> ModelFacts:
    family = found_family(folder)
    return facts_of(read_config(folder), family)


def load_model(folder: Path, options: BuildOptions) -> TransformersModel:
    """Raises CheckpointError when a tensor is missing or has another shape, on all ranks of a sharded model.

    A sharded model is filled from a whole one in the host memory of the group's first rank. Collective then.
    """
    family = found_family(folder)
    tokens = len(AutoTokenizer.from_pretrained(folder, **LOCAL))
    if options.zero3 is None:
        whole = _from_files(folder, family, options.dtype)
        model = TransformersModel(whole.to(options.device), family, tokens)
        if not family.tried:
            check_untried(model, folder)
        return model
    source = _read_on_first(folder, family, options, tokens)
    config = read_config(folder)
    with sharded_construction(options), no_init_weights():
        whole = AutoModelForImageTextToText.from_config(
            config, dtype=options.dtype, attn_implementation=attention_of_parts(config, family)
        )
    whole.tie_weights()
    built = next(whole.parameters()).dtype
    assert built == options.dtype, f"ZeRO-3 built {built}, wanted {options.dtype}"
    given = {} if source is None else dict(source.named_parameters())
    for name, parameter in whole.named_parameters():
        with gathered(parameter, modifier_rank=0):
            if source is not None:
                parameter.data.copy_(given[name])
    model = TransformersModel(whole, family, tokens)
    # Built in the model's half precision, some of them; the whole model of the first rank has them right.
    found = [dict(source.named_buffers()) if source is not None and torch.distributed.get_rank() == 0 else {}]
    torch.distributed.broadcast_object_list(found)
    model.set_fresh_buffers(found[0])
    model.restore_buffers(options.device)
    return model


def _read_on_first(folder: Path, family: Family, options: BuildOptions, tokens: int) -> Any:
    """The whole model on the ranks that read the weights, None on the others. Where one cannot read them, all
    ranks raise: the others would wait for it in the collectives that follow. Collective."""
    whole, own = None, None
    if reads_weights(options):
        try:
            whole = _from_files(folder, family, options.dtype)
            if not family.tried:
                check_untried(TransformersModel(whole, family, tokens), folder)
        except Exception as error:
            own = error
    failure = None if own is None else describe_failure(torch.distributed.get_rank(), own)
    failures: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    if own is not None:
        raise own
    for elsewhere in failures:
        if elsewhere is not None:
            raise error_elsewhere(*elsewhere)
    return whole


def _from_files(folder: Path, family: Family, dtype: torch.dtype, attention: str | None = None) -> Any:
    """``attention``: the language model's; None: ours."""
    config = read_config(folder)
    parts = attention_of_parts(config, family) if attention is None else attention_with(config, attention)
    try:
        whole, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=parts,
            output_loading_info=True,
            **LOCAL,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be loaded: {error}") from error
    problems = [f"missing: {name}" for name in sorted(report["missing_keys"])]
    problems += [f"wrong shape: {name}" for name in sorted(map(str, report["mismatched_keys"]))]
    problems += [f"unexpected: {name}" for name in sorted(report["unexpected_keys"])]
    if problems:
        raise CheckpointError(f"{folder}: {len(problems)} tensors do not fit\n  " + "\n  ".join(problems))
    return whole


def load_whole(folder: Path, options: BuildOptions, tensors: Mapping[str, torch.Tensor]) -> Any:
    """transformers' own model for generation, with ``tensors`` (our names) instead of the folder's weights.
    Raises CheckpointError."""
    whole = _from_files(folder, found_family(folder), options.dtype, "sdpa")
    parameters = dict(whole.named_parameters())
    named = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    if tensors and parameters.keys() - named.keys():
        raise CheckpointError(f"{folder}: the run has other parameters than the folder that it began from")
    for name, parameter in parameters.items() if tensors else ():
        parameter.data.copy_(named[name])
    return whole.to(options.device)


@dataclass(frozen=True)
class FolderSettings:
    """What a model without weights is built from: a folder's config.json and generation_config.json."""

    config: Any
    generation: GenerationConfig


def read_settings(folder: Path) -> FolderSettings:
    """As transformers does when it loads the folder. Raises CheckpointError."""
    config = read_config(folder)
    if not (folder / GENERATION).is_file():
        return FolderSettings(config, GenerationConfig.from_model_config(config))
    try:
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: transformers cannot read its {GENERATION}: {error}") from error
    return FolderSettings(config, generation)


def whole_around(
    model: TransformersModel, settings: FolderSettings, tensors: Mapping[str, torch.Tensor]
) -> Any:
    """The same with ``settings``, around ``tensors`` (our names), which are not copied; buffers are copies of
    ``model``'s. Reads no file. Raises CheckpointError when the names are not those of the parameters."""
    config = settings.config
    with torch.device("meta"), no_init_weights():
        whole = AutoModelForImageTextToText.from_config(
            config,
            dtype=next(iter(tensors.values())).dtype,
            attn_implementation=attention_with(config, "sdpa"),
        )
    named = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    buffers = {name: value.clone() for name, value in model.whole.named_buffers()}
    found = whole.load_state_dict(named, strict=False, assign=True)  # without tied ones and buffers
    whole.tie_weights()
    for name, value in buffers.items():
        module, _, buffer = name.rpartition(".")
        whole.get_submodule(module)._buffers[buffer] = value
    check_filled(whole, found.unexpected_keys)
    whole.generation_config = settings.generation
    return whole.requires_grad_(False)


def _saved_buffers(whole: Any, source: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Those that are part of a model's files, such as the factor of a layer. Training leaves them alone."""
    wanted = {name for name, _ in whole.named_buffers()} & whole.state_dict().keys()
    if not wanted:
        return {}
    given = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **LOCAL)
    return {name: value for name, value in given.named_buffers() if name in wanted}


def write_model(out: Path, source: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write configuration, weights and processor into ``out``, a folder that exists.

    ``tensors`` have transformers' names in memory; ``source`` is the folder that the model came from, whose
    other files (tokenizer, processor, chat template, settings of generation) are copied.
    """
    config = read_config(source)
    dtype = next(iter(tensors.values())).dtype
    with torch.device("meta"), no_init_weights():
        whole = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    state = dict(tensors)
    names = {module: f"{name}.weight" for name, module in whole.named_modules()}
    # A tied head has no parameter of its own.
    embedding = state[names[whole.get_input_embeddings()]]
    state.setdefault(names[whole.get_output_embeddings()], embedding)
    state |= _saved_buffers(whole, source, dtype)
    whole.save_pretrained(out, state_dict=state)
    if (source / GENERATION).is_file():  # what was written follows from config.json alone
        (out / GENERATION).unlink()
    for path in sorted(source.iterdir()):
        is_weight = path.suffix in (".safetensors", ".bin", ".pt", ".pth") or ".index." in path.name
        if path.is_file() and not is_weight and not (out / path.name).exists() and path.name != "README.md":
            shutil.copyfile(path, out / path.name)
