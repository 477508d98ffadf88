"""From a folder to a model that answers: the one loader behind `alignkd eval`, `alignkd chat` and
``alignkd.load``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from rich.console import Console

from alignkd.checkpoint.export import SavedStudent, saved_student
from alignkd.config import load_run_config
from alignkd.config.schema import DEFAULT_MAX_IMAGE_PIXELS, DataSource
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError
from alignkd.evaluate.answering_model import AnsweringModel
from alignkd.evaluate.chat_model import ChatModel
from alignkd.evaluate.gguf_limits import refuse_choices
from alignkd.evaluate.gguf_model import GgufModel
from alignkd.evaluate.mobilevlm_model import MobileVLMAnswers
from alignkd.evaluate.model_folders import FolderKind, folder_kind
from alignkd.models.agreement import student_folder, student_model_config
from alignkd.models.building import DTYPES, BuildOptions
from alignkd.models.encoding import chat_encoder
from alignkd.models.families.mobilevlm import public_name
from alignkd.models.families.mobilevlm_loading import load_model, model_of_tensors
from alignkd.models.families.table import family_of
from alignkd.models.families.transformers_loading import load_whole
from alignkd.models.families.untried import found_family
from alignkd.run_folder.paths import RunPaths


def load(
    folder: str | Path, *, step: int | None = None, device: str | None = None, precision: str | None = None
) -> AnsweringModel:
    """Load an export, a folder of MobileVLM V2 or of a family of docs/models.md, or the student in a run's
    checkpoint (the newest, or that of ``step``). ``device``: default a GPU if there is one; ``precision``
    bf16, fp16 or fp32: default bf16 on a GPU, fp32 on a CPU. A GGUF export has its own precision and
    answers on the CPU; another choice is refused. Raises UserError."""
    folder = Path(folder)
    kind = folder_kind(folder, step)
    if kind is FolderKind.GGUF:
        refuse_choices(folder, precision=precision, device=device)
        return GgufModel(folder)
    where = _device(device)
    precision = precision or ("fp32" if where.type == "cpu" else "bf16")
    if precision not in DTYPES:
        raise UserError(f"precision {precision!r:.80} is unknown; valid: {', '.join(DTYPES)}")
    if precision == "fp32":  # and not TF32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    options = BuildOptions(DTYPES[precision], where)
    saved = saved_student(folder, step) if kind is FolderKind.CHECKPOINT else None
    if saved is not None:
        source = student_folder(saved.model)
    else:
        source = folder if kind is FolderKind.MODEL else RunPaths(folder).student
    if family_of(source) is None:
        return _mobilevlm(source, saved, options, precision, f"{folder}, step {saved.step}" if saved else "")
    of_images = {} if kind is FolderKind.MODEL else _image_options_of_run(folder)
    return _chat_model(source, saved, options, precision, of_images)


def _mobilevlm(
    source: Path, saved: SavedStudent | None, options: BuildOptions, precision: str, shown: str
) -> MobileVLMAnswers:
    if saved is None:
        model = load_model(source, options)
    else:
        tensors = {public_name(name): value for name, value in saved.tensors.items()}
        model = model_of_tensors(student_model_config(saved.model), tensors, options, shown)
    tokenizer = SentencePieceTokenizer.from_folder(source)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only "
            f"{model.config.vocab_size}"
        )
    return MobileVLMAnswers(model, tokenizer, precision)


def _chat_model(
    source: Path,
    saved: SavedStudent | None,
    options: BuildOptions,
    precision: str,
    of_images: dict[str, Any],
) -> ChatModel:
    family = found_family(source)
    whole = load_whole(source, options, {} if saved is None else saved.tensors)
    encoder = chat_encoder(source, DEFAULT_MAX_IMAGE_PIXELS)
    return ChatModel(whole, family, encoder, precision, of_images)


def image_options(sources: Sequence[DataSource]) -> dict[str, Any] | None:
    """What a student was trained with; None if its sources differ in them."""
    found = [source.image_options for source in sources if source.image_folder is not None] or [{}]
    return found[0] if all(options == found[0] for options in found) else None


def _image_options_of_run(run: Path) -> dict[str, Any]:
    """None are used, with a note, if the sources differ in them."""
    found = image_options(load_run_config(RunPaths(run).config).data.sources)
    if found is not None:
        return found
    if os.environ.get("RANK", "0") == "0":
        text = f"note: {run}: its sources differ in image_options; images are processed without any"
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
    return {}


def _device(name: str | None) -> torch.device:
    """``name``, or this rank's accelerator if there is one, else the CPU. Raises UserError."""
    try:
        if name is not None:
            device = torch.device(name)
            torch.empty(1, device=device)
            return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r:.80} cannot be used ({str(error).splitlines()[0]})") from None
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu" or not accelerator.is_available():
        return torch.device("cpu")
    return torch.device(
        accelerator.device_name(int(os.environ.get("LOCAL_RANK", "0")) % accelerator.device_count())
    )
