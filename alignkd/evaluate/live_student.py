"""The student of a running engine as a model that answers, without a change to the engine.

Modules of their own are built around the student's weights: what generation needs (another attention, a key
value cache, evaluation mode, no hooks) never touches the modules that train. Under ZeRO stage 3 the weights
are gathered once into copies, so that each rank then answers by itself: a gather in every forward would send
all weights for each token, and ranks whose answers end early would have to keep pace with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional

from alignkd.config.schema import DEFAULT_MAX_IMAGE_PIXELS, Config
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.evaluate.answering_model import AnsweringModel
from alignkd.evaluate.chat_model import ChatModel
from alignkd.evaluate.mobilevlm_model import MobileVLMAnswers
from alignkd.evaluate.model import image_options
from alignkd.models.agreement import student_folder
from alignkd.models.building import full_tensors
from alignkd.models.encoding import chat_encoder
from alignkd.models.families import mobilevlm_loading, transformers_loading
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.families.table import family_of
from alignkd.models.families.transformers import TransformersModel
from alignkd.models.lora import merged

# From a student to a model that answers with its weights of this moment. Collective under ZeRO stage 3.
LiveStudent = Callable[[VisionLanguageModel], AnsweringModel]


def live_student(config: Config) -> LiveStudent:
    """Reads the tokenizer or processor and the settings of the run's student; the function that it returns
    reads no file, since one that a single rank cannot read would leave the others in a collective.
    Raises UserError."""
    folder, precision = student_folder(config.model), config.training.precision
    if family_of(folder) is None:
        tokenizer = SentencePieceTokenizer.from_folder(folder)

        def mobilevlm(student: VisionLanguageModel) -> AnsweringModel:
            assert isinstance(student, MobileVLM)
            model = mobilevlm_loading.model_around(student, _weights(student, config))
            return MobileVLMAnswers(model, tokenizer, precision)

        return mobilevlm
    return _chat_student(folder, config)


def _chat_student(folder: Path, config: Config) -> LiveStudent:
    encoder = chat_encoder(folder, DEFAULT_MAX_IMAGE_PIXELS)
    settings = transformers_loading.read_settings(folder)
    options = image_options(config.data.sources) or {}

    def chat(student: VisionLanguageModel) -> AnsweringModel:
        assert isinstance(student, TransformersModel)
        whole = transformers_loading.whole_around(student, settings, _weights(student, config))
        return ChatModel(whole, student.family, encoder, config.training.precision, options)

    return chat


@contextmanager
def own_linear() -> Iterator[None]:
    """torch's own linear layer inside: once ZeRO-3 has built a model, DeepSpeed's stands in its place for all
    models of the process. It rounds differently in bf16, so answers would not be those of the export."""
    deepspeeds = functional.linear
    functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = deepspeeds


def _weights(student: VisionLanguageModel, config: Config) -> dict[str, torch.Tensor]:
    """Whole, with LoRA adapters merged: the student's own tensors wherever they are whole already."""
    sharded = any(hasattr(parameter, "ds_id") for parameter in student.parameters())
    tensors = _clones(full_tensors(student)) if sharded else dict(full_tensors(student))
    return tensors if config.student.lora is None else merged(tensors, config.student.lora)


def _clones(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Goes through all of them even where there is no room: the other ranks take part in the gather of each.
    Raises what the first clone that failed raised."""
    clones: dict[str, torch.Tensor] = {}
    failure: RuntimeError | None = None
    for name, value in tensors:
        if failure is not None:
            continue
        try:
            clones[name] = value.clone()
        except RuntimeError as error:  # out of memory, be it the device's or the host's
            failure = error
            clones.clear()  # the gathers to come need room
    if failure is not None:
        raise failure
    return clones
