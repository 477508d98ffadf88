"""Families that are not in the table: what their row would say is found in the model, and checked.

:func:`found_family` needs the configuration, an empty model and the processor; :func:`check_untried` the
weights. Whatever does not fit is refused by name.
"""

from __future__ import annotations

import inspect
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from alignkd.config.schema import DataSource
from alignkd.data.chat_encoder import TEXT_KEYS, ChatEncoder
from alignkd.data.collate import collate
from alignkd.data.records import Sample, Turn
from alignkd.errors import AlignkdError, CheckpointError
from alignkd.models.families.interface import ModelOutputs
from alignkd.models.families.processors import read_config, read_processor
from alignkd.models.families.table import Family, family_of
from alignkd.models.families.transformers import TransformersModel, eager_attention
from alignkd.teacher.targets import attention_block

log = logging.getLogger(__name__)

PROJECTORS = ("merger", "projector", "connector")  # names of those that are part of a tower
MARKS = ("mm_token_type_ids", "token_type_ids")
SIZE = (80, 48)  # of the image that models are checked with
# Norm of the difference by the norm, between our forward and transformers' own.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3}
HALF_TOLERANCE = 0.05


def found_family(folder: Path) -> Family:
    """The row of a model folder's family, which is no MobileVLM. Raises CheckpointError if it is not in the
    table and not like those that are."""
    family = family_of(folder)
    assert family is not None, "MobileVLM is no family of transformers"
    return family if family.tried else _found(folder, family)


def _found(folder: Path, family: Family) -> Family:
    config = read_config(folder)
    try:
        with torch.device("meta"), no_init_weights():
            whole = AutoModelForImageTextToText.from_config(config)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        _refuse(folder, family, f"AutoModelForImageTextToText cannot build it ({error})")
    model: Any = getattr(whole, "model", None)
    if not hasattr(model, "get_image_features") or "mm_encoder_outputs" not in _arguments(model.forward):
        _refuse(folder, family, "its model takes no features of images that were computed before")
    if not any(hasattr(layer, "self_attn") for layer in getattr(whole.get_decoder(), "layers", ())):
        _refuse(folder, family, "no decoder layer with a softmax attention (`self_attn`) was found")
    family = _with_modules(folder, family, whole)
    accepted = _arguments(model.forward)
    marks = next((name for name in MARKS if name in accepted), None)
    family = replace(family, marks_images=marks, has_masks=True)
    softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    family = replace(family, has_softcap=softcap is not None)
    return _with_inputs(folder, family, model)


def _with_modules(folder: Path, family: Family, whole: Any) -> Family:
    tower = whole.get_encoder("image")
    names = {module: name for name, module in whole.named_modules()}
    if tower is whole or tower is whole.model:
        _refuse(folder, family, "no vision tower was found")
    parts = {f"model.{name}": child for name, child in whole.model.named_children()}
    decoder = set(whole.get_decoder().modules())
    others = [
        name
        for name, child in parts.items()
        if child is not tower and not decoder & set(child.modules()) and any(True for _ in child.parameters())
    ]
    sound = tuple(name for name in others if "audio" in name)
    projector = tuple(name for name in others if name not in sound)
    if not projector:
        inside = [f"{names[tower]}.{name}" for name, _ in tower.named_children()]
        projector = tuple(name for name in inside if any(part in name for part in PROJECTORS))
    if not projector:
        _refuse(folder, family, "no projector between vision tower and language model was found")
    return replace(family, tower=(names[tower],), projector=projector, unused=sound)


def _with_inputs(folder: Path, family: Family, model: Any) -> Family:
    processor = read_processor(folder)
    image = Image.new("RGB", SIZE, (90, 120, 150))
    token = processor.image_token
    answer = processor(text=[f"{token} {token}"], images=[[image, image]], return_tensors="pt")
    inputs = {name: value for name, value in answer.items() if name not in TEXT_KEYS}
    unknown = sorted(inputs.keys() - _arguments(model.get_image_features))
    if unknown or "pixel_values" not in inputs:
        what = f"takes no {', '.join(unknown)}" if unknown else "is given no pixel_values"
        _refuse(folder, family, f"its vision tower {what}, which is what its processor makes")
    by_row = all(len(value) == 1 for value in inputs.values())  # of two images
    positions = tuple(sorted(inputs.keys() & _arguments(model.forward) - {"pixel_values"}))
    return replace(family, inputs_by_row=by_row, position_inputs=positions)


def check_untried(model: TransformersModel, folder: Path) -> None:
    """Compare one sample's forward with transformers' own: vision tokens at their places, the attention block
    of the first softmax layer, and logits. Raises CheckpointError."""
    family = model.family
    log.warning(
        "%s: %s is untried; it is compared with transformers on one sample", folder, family.model_type
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            different = _different(model, folder)
    except CheckpointError:
        raise
    except (AlignkdError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        _refuse(folder, family, f"a sample could not be run ({type(error).__name__}: {error})")
    finally:
        model.train(was_training)
    if different:
        _refuse(folder, family, f"these differ from transformers' own: {', '.join(different)}")


def _different(model: TransformersModel, folder: Path) -> list[str]:
    family, whole = model.family, model.whole
    processor, token = read_processor(folder), whole.config.image_token_id
    encoder = ChatEncoder(folder, processor, token, SIZE[0] * SIZE[1], by_row=family.inputs_by_row)
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    turns = (Turn("human", "<image>\nwhat is this"), Turn("gpt", "a cat"), Turn("human", "and now"))
    sample = Sample(0, 0, "check", ("image.png",), (*turns, Turn("gpt", "a dog")))
    with tempfile.TemporaryDirectory(prefix="alignkd-") as images:
        image.save(Path(images) / "image.png")
        example = encoder.encode(sample, DataSource(file="check", image_folder=images, template="chat"))
    some = next(whole.parameters())
    batch = collate([example], encoder.collate_settings(top_k=1)).to(some.device)
    ours: ModelOutputs = model(batch)
    natural = processor(text=[encoder.rendered(sample).text], images=[[image]], return_tensors="pt")
    natural = {
        name: value.to(some.device, some.dtype if value.is_floating_point() else value.dtype)
        for name, value in natural.items()
        if name != "num_soft_tokens_per_image"
    }
    if natural["input_ids"][0].tolist() != example.ids:
        return ["tokens"]
    with eager_attention(whole, family):
        theirs = whole(**natural, output_attentions=True, output_hidden_states=True)
    (columns,) = (torch.from_numpy(found).to(some.device) for found in example.columns)
    rows = batch.text_rows_IM[0]
    attention = next((found for found in theirs.attentions or () if found is not None), None)
    if attention is None or not len(columns):
        return ["attention maps, of which there are none"]
    logits = model.logits(ours.hidden_BLD)
    pairs = {
        "vision tokens": (ours.vision_tokens_IVD[0], theirs.hidden_states[0][0, columns]),
        "attention of the first softmax layer": (
            attention_block(ours, batch, model.facts)[0],
            attention[0][:, rows][:, :, columns],
        ),
        "logits": (logits, theirs.logits[..., : logits.shape[-1]]),
    }
    return [name for name, (found, wanted) in pairs.items() if not _close(found, wanted, some.dtype)]


def _close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    if found.shape != wanted.shape:
        return False
    difference = (found.double() - wanted.double()).norm() / wanted.double().norm()
    return bool(difference <= TOLERANCES.get(dtype, HALF_TOLERANCE))


def _arguments(function: Any) -> set[str]:
    return set(inspect.signature(inspect.unwrap(function)).parameters)


def _refuse(folder: Path, family: Family, what: str) -> NoReturn:
    raise CheckpointError(f"{folder}: `model_type` {family.model_type} is untried, and is refused: {what}")
