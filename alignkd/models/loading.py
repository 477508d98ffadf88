"""Load a model of any family from its folder, and tell the weights of models apart."""

from __future__ import annotations

import itertools
from pathlib import Path

from torch import nn

from alignkd.config.schema import ModelSection
from alignkd.models.agreement import student_folder
from alignkd.models.building import BuildOptions, full_tensors, hash_tensors
from alignkd.models.configuration import read_model_config
from alignkd.models.families import mobilevlm, mobilevlm_loading, transformers_loading
from alignkd.models.families.interface import ModelFacts, VisionLanguageModel
from alignkd.models.families.table import family_of


def load_model(folder: Path | str, options: BuildOptions) -> VisionLanguageModel:
    """Load a complete model folder. Raises CheckpointError for a family that is not supported, and for
    tensors that do not fit, listing all of them."""
    if family_of(Path(folder)) is None:
        return mobilevlm_loading.load_model(folder, options)
    return transformers_loading.load_model(Path(folder), options)


def load_student(
    section: ModelSection, seed: int, options: BuildOptions
) -> tuple[VisionLanguageModel, list[str]]:
    """The model to train, and the names of the tensors that did not come from ``model.student``."""
    folder = student_folder(section)
    if family_of(folder) is None:
        return mobilevlm_loading.load_student(section, seed, options)
    return transformers_loading.load_model(folder, options), []


def model_facts(folder: Path | str) -> ModelFacts:
    """The sizes of a model from its config.json."""
    if family_of(Path(folder)) is None:
        return mobilevlm.facts_of(read_model_config(folder))
    return transformers_loading.read_facts(Path(folder))


def fingerprint(model: VisionLanguageModel, *, hashing: bool = True) -> str:
    """sha256 over published names, shapes and bytes: equal for a sharded and a whole model. Collective under
    ZeRO-3."""
    return hash_tensors(((model.public_name(name), value) for name, value in full_tensors(model)), hashing)


def frozen_fingerprint(module: nn.Module, *, hashing: bool = True) -> str:
    """The same over what training does not change: frozen parameters and all buffers, under our names."""
    frozen = full_tensors(module, only_frozen=True)
    return hash_tensors(itertools.chain(frozen, module.named_buffers()), hashing)
