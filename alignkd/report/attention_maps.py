"""Where teacher and student look: the first layer's attention of text to vision tokens (the paper's Figure
4), over samples of a run's own data, before and after training.

Shapes: V vision tokens of an image, H heads, M text rows, S side of an image in pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from alignkd.checkpoint.export import saved_student
from alignkd.config import load_run_config
from alignkd.config.schema import Config, DataSource
from alignkd.data.batch import Batch
from alignkd.data.collate import Example, collate
from alignkd.data.encoder import MobileVLMEncoder
from alignkd.data.images import ImageProcessor
from alignkd.data.index_parts import checked_sample
from alignkd.data.json_list import JsonListFile
from alignkd.data.records import IMAGE_MARKER, BadSample, Sample
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError
from alignkd.losses.attention import text_vision_block
from alignkd.losses.vision import focus_scores
from alignkd.models.agreement import student_folder, student_model_config
from alignkd.models.building import DTYPES, BuildOptions
from alignkd.models.configuration import MobileVLMConfig
from alignkd.models.families.interface import ModelOutputs
from alignkd.models.families.mobilevlm import MobileVLM, public_name
from alignkd.models.families.mobilevlm_loading import load_model, load_student, model_of_tensors
from alignkd.models.families.table import family_name
from alignkd.run_folder.checkpoints import committed_steps
from alignkd.run_folder.paths import RunPaths
from alignkd.teacher.targets import block_layout

THUMBNAIL = 224  # pixels per side, at most
_QUALITY = 85  # of its JPEG
_MOST_TEXT = 500  # characters of a question or an answer
_LOOKED_AT = 1000  # entries of each source, at most


class Chosen(NamedTuple):
    sample: Sample
    batch: Batch
    pixels: torch.Tensor  # float32 [3, S, S], normalised


@dataclass(frozen=True)
class SampleMaps:
    """``maps``: model -> for each vision token, row by row of the grid, the share of a text token's attention
    that it gets, averaged over heads and text rows."""

    id: str
    question: str
    answer: str
    image: str  # data URI: what the models see
    maps: dict[str, list[float]]


def attention_maps(run: Path, count: int, device: str) -> dict[str, Any]:
    """``{"side", "top_k", "samples": [SampleMaps]}``, JSON. Of the models "teacher", "start" and "student"
    those that the run has; "start" is what the student was before training.

    Raises UserError for a family that has no grid of vision tokens, and where no sample has one image.
    """
    config = load_run_config(RunPaths(run).config)
    folder = student_folder(config.model)
    family = family_name(folder)
    if family != "mobilevlm":
        raise UserError(f"{folder}: attention is drawn for MobileVLM V2 models only, not for {family}")
    model_config = student_model_config(config.model)
    chosen = _chosen_samples(config, model_config, folder, count)
    if not chosen:
        raise UserError("no attention is drawn: the run's data have no sample with exactly one image")
    where = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    options = BuildOptions(DTYPES[config.training.precision], where)
    maps = {name: _maps(load(options), chosen) for name, load in _models(run, config).items()}
    samples = [
        SampleMaps(
            sample.id,
            sample.turns[0].text.replace(IMAGE_MARKER, "").strip()[:_MOST_TEXT],
            sample.turns[1].text[:_MOST_TEXT],
            _picture(pixels, model_config.preprocessor_config),
            {name: found[number] for name, found in maps.items()},
        )
        for number, (sample, _, pixels) in enumerate(chosen)
    ]
    return {
        "side": model_config.mm_vision_tokens_per_side,
        "top_k": config.distillation.top_k,
        "samples": [asdict(sample) for sample in samples],
    }


def _chosen_samples(config: Config, model: MobileVLMConfig, folder: Path, count: int) -> list[Chosen]:
    """The first samples with one image, of conversations (template v1) rather than of captions."""
    processor = ImageProcessor(model.preprocessor_config, config.data.max_image_pixels)
    encoder = MobileVLMEncoder(SentencePieceTokenizer.from_folder(folder), model.vision_tokens, processor)
    settings = encoder.collate_settings(top_k=config.distillation.top_k)
    found: list[Chosen] = []
    numbered = enumerate(config.data.sources)
    for number, source in sorted(numbered, key=lambda pair: pair[1].template != "v1"):
        for sample in _readable(source, number, encoder):
            if len(found) == count:
                return found
            try:
                example: Example = encoder.encode(sample, source)
            except BadSample:
                continue
            found.append(Chosen(sample, collate([example], settings), example.images[0]))
    return found


def _readable(source: DataSource, number: int, encoder: MobileVLMEncoder) -> Iterator[Sample]:
    file = JsonListFile(source.file)
    for entry, (start, stop) in enumerate(file.ranges()):
        if entry == _LOOKED_AT:
            return
        try:
            sample = checked_sample(file.entry(start, stop), source, number, entry, encoder)
        except BadSample:
            continue
        if len(sample.images) == 1:
            yield sample


def _models(run: Path, config: Config) -> dict[str, Callable[[BuildOptions], MobileVLM]]:
    """Loaded one after another, so that only one needs memory."""
    models: dict[str, Callable[[BuildOptions], MobileVLM]] = {}
    teacher, student = config.model.teacher, RunPaths(run).student
    if teacher is not None and config.distillation.enabled:
        models["teacher"] = lambda options: load_model(teacher, options)
    models["start"] = lambda options: load_student(config.model, config.training.seed, options)[0]
    if (student / "config.json").is_file():
        models["student"] = lambda options: load_model(student, options)
    elif committed_steps(run):
        models["student"] = lambda options: _of_checkpoint(run, options)
    return models


def _of_checkpoint(run: Path, options: BuildOptions) -> MobileVLM:
    saved = saved_student(run, None)
    tensors = {public_name(name): value for name, value in saved.tensors.items()}
    return model_of_tensors(student_model_config(saved.model), tensors, options, f"{run}, step {saved.step}")


@torch.no_grad()
def _maps(model: MobileVLM, chosen: list[Chosen]) -> list[list[float]]:
    """[V] for each sample. Only the first layer runs."""
    model.eval()
    model.language_model.layers = model.language_model.layers[:1]
    device = model.head.weight.device
    found = []
    for one in chosen:
        batch = one.batch.to(device)
        outputs: ModelOutputs = model(batch)
        block_IHMV = text_vision_block(*outputs.first_layer, block_layout(batch, model.facts))
        rows = max(1, one.batch.image_places[0].rows)
        found.append((focus_scores(block_IHMV)[0] / rows).tolist())
    return found


def _picture(pixels: torch.Tensor, preprocessor: dict[str, Any]) -> str:
    mean, std = (torch.tensor(preprocessor[key])[:, None, None] for key in ("image_mean", "image_std"))
    bytes_SS3 = ((pixels * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    image = Image.fromarray(bytes_SS3.numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
