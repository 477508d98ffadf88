"""Tensors and shapes of transformers' families without torch, against the real classes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, PROCESSOR_MAPPING, AutoConfig, AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from alignkd.config import load_config
from alignkd.config.schema import DataSection, DataSource
from alignkd.data.pair_encoder import with_grids
from alignkd.data.records import Sample, Turn
from alignkd.errors import CheckpointError
from alignkd.models.encoding import chat_encoder
from alignkd.models.processor_files import SETTINGS
from launcher.plan.family_config import FAMILIES, TEXT, VISION
from launcher.plan.family_sizes import family_sizes
from launcher.plan.image_tokens import FIXED
from launcher.plan.sizes import run_sizes
from launcher.plan.tensors import ModelSizes
from tests import vlm, vlm_grids
from tests.model_folders import change_json
from tests.published_families import CONFIGS, PARAMETERS, write_model_folder

SOURCE = DataSource(file="none.json", template="chat")
DATA = DataSection(sources=[SOURCE], max_length=2048)
SAMPLE = Sample(0, 0, "", ("image.png",), (Turn("human", "<image> What?"), Turn("gpt", "Nothing.")))
LANGUAGE = ("model.language_model.", "model.text_model.")
TOWER = ("model.vision_tower.", "model.vision_model.", "model.visual.")
PROJECTOR = ("model.multi_modal_projector.", "model.connector.")


def real_sizes(folder: Path) -> dict[str, int]:
    """Of transformers' own model, by our names."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    return {our_name(name): parameter.numel() for name, parameter in model.named_parameters()}


def our_name(name: str) -> str:
    for theirs, ours in ((LANGUAGE, "language_model."), (PROJECTOR, "projector."), (TOWER, "vision_tower.")):
        for prefix in theirs:
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                return ("projector." if rest.startswith(("merger.", "deepstack_merger")) else ours) + rest
    return name.replace("lm_head.", "head.").removeprefix("model.")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_a_published_model_is_counted(name: str, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / name, name)
    sizes = family_sizes(folder, CONFIGS[name]["model_type"], DATA)
    assert sizes.tensors == real_sizes(folder)
    assert sizes.count() == PARAMETERS.get(name, sizes.count())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_every_tensor_of_a_tiny_model_is_counted(family: str, role: str) -> None:
    folder = vlm.folder(family, role)
    assert family_sizes(folder, family, DATA).tensors == real_sizes(folder)


@pytest.mark.parametrize("name", [*TEXT, *VISION])
def test_values_that_a_file_leaves_out_are_those_of_transformers(name: str) -> None:
    theirs = CONFIG_MAPPING[name]()
    for key, value in (TEXT | VISION)[name].items():
        if value is None:
            heads = theirs.num_attention_heads
            value = heads if key == "num_key_value_heads" else theirs.hidden_size // heads
        found = getattr(theirs, key, value)
        assert (list(found) if isinstance(found, tuple) else found) == value, key


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_values_of_a_family_are_those_of_transformers(family: str) -> None:
    theirs = CONFIG_MAPPING[family]()
    text, vision, values = FAMILIES[family]
    assert (theirs.text_config.model_type, theirs.vision_config.model_type) == (text, vision)
    assert {key: getattr(theirs, key) for key in values} == values
    assert theirs.tie_word_embeddings == values.get("tie_word_embeddings", False)


@pytest.mark.parametrize(
    ("name", "tokens", "patches"),
    [
        ("llava-1.5-7b-hf", 576, 576),
        ("gemma-3-4b-it", 256, 4096),
        ("Qwen3-VL-2B-Instruct", 1024, 4096),
        ("InternVL3-2B-hf", 1024, 4096),
        ("SmolVLM2-256M-Video-Instruct", 1024, 16384),
    ],
)
def test_vision_tokens_are_those_of_the_configuration_or_half_of_the_length(
    name: str, tokens: int, patches: int, tmp_path: Path
) -> None:
    sizes = family_sizes(write_model_folder(tmp_path / name, name), CONFIGS[name]["model_type"], DATA)
    shapes = sizes.shapes
    assert (shapes.vision_tokens, shapes.vision.patches) == (tokens, patches)
    assumed = [note for note in sizes.notes if "half of data.max_length is assumed" in note]
    assert bool(assumed) == (tokens == 1024)
    patch = {"Qwen3-VL-2B-Instruct": 2 * 16**2, "SmolVLM2-256M-Video-Instruct": 16**2}.get(name, 14**2)
    assert shapes.vision.values == patches * 3 * patch


@pytest.mark.parametrize("family", [family for family in vlm_grids.FAMILIES if family in FAMILIES])
def test_teacher_and_student_are_counted_with_the_tokens_that_their_processors_make(
    family: str, tmp_path: Path
) -> None:
    """Of an image as large as either of them takes."""
    pair, image = vlm_grids.pair(family), Image.new("RGB", (200, 200))
    path = vlm.write_configuration(tmp_path, family)
    sizes = run_sizes(load_config(path, [f"model.teacher={pair.teacher}", f"model.student={pair.student}"]))
    assert sizes.teacher is not None
    for folder, model in ((pair.teacher, sizes.teacher), (pair.student, sizes.student)):
        encoder = chat_encoder(folder, 10**6)
        made = with_grids(encoder.encode_images(SAMPLE, [image], SOURCE), folder)
        assert model.shapes.vision_tokens == len(made.columns[0]), folder
        is_qwen = family.startswith("qwen")
        assert (model.images is not None and model.images.is_fixed) != is_qwen
    notes = [note for note in sizes.notes if "is large" in note or "of the teacher" in note]
    assert bool(notes) == is_qwen


@pytest.mark.parametrize(
    ("student", "teacher", "max_pixels", "tokens"),
    [
        ((4, 16384), (4, 16384), 10**9, (1024, 1024)),  # half of max_length for both
        ((4, 16384), (4, 512), 10**9, (1024, 512)),  # the teacher makes it smaller
        ((4, 16384), (2048, 16384), 10**9, (1024, 2048)),  # or larger
        ((4, 256), (4, 1280), 10**9, (256, 1280)),  # as large as the teacher takes it
        ((4, 256), (4, 1280), 900 * 1024, (256, 900)),  # but no larger than the data may be
        ((1500, 1600), (4, 1280), 10**9, (1500, 1280)),
    ],
)
def test_budgets_of_pixels_bound_the_tokens_of_an_image(
    student: tuple[int, int],
    teacher: tuple[int, int],
    max_pixels: int,
    tokens: tuple[int, int],
    tmp_path: Path,
) -> None:
    """In tokens of 32 x 32 pixels."""
    made: list[ModelSizes] = []
    for role, (least, most) in (("student", student), ("teacher", teacher)):
        folder = write_model_folder(tmp_path / role, "Qwen3-VL-2B-Instruct")
        settings = {"image_processor": {"min_pixels": least * 1024, "max_pixels": most * 1024}}
        (folder / "processor_config.json").write_text(json.dumps(settings))
        data = DATA.model_copy(update={"max_image_pixels": max_pixels})
        made.append(family_sizes(folder, "qwen3_vl", data, made[0] if made else None))
    assert tuple(sizes.shapes.vision_tokens for sizes in made) == tokens
    assert made[0].least_vision_tokens == student[0]


def test_the_note_says_why_so_many_tokens_are_assumed(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", "Qwen3-VL-2B-Instruct")
    for least, most, why in (
        (4, 256, "256 are assumed, the most"),
        (1500, 1600, "1500 are assumed, the fewest"),
        (4, 16384, "half of data.max_length is assumed (1024)"),
    ):
        settings = {"image_processor": {"min_pixels": least * 1024, "max_pixels": most * 1024}}
        (folder / "processor_config.json").write_text(json.dumps(settings))
        assert why in family_sizes(folder, "qwen3_vl", DATA).notes[1]


@pytest.mark.parametrize("name", ["llava-1.5-7b-hf", "gemma-3-4b-it", "Qwen3-VL-2B-Instruct"])
def test_a_config_json_alone_can_be_planned(name: str, tmp_path: Path) -> None:
    folder, family = write_model_folder(tmp_path / name, name), CONFIGS[name]["model_type"]
    with_processor = family_sizes(folder, family, DATA)
    for file in SETTINGS:
        (folder / file).unlink(missing_ok=True)
    alone = family_sizes(folder, family, DATA)
    assert alone.tensors == with_processor.tensors
    for teacher, student in ((alone, with_processor), (with_processor, alone)):
        if not with_processor.images.is_fixed:  # the same image has as many tokens for both
            beside = teacher.images.beside(student.shapes.vision_tokens, student.images)
            assert beside == student.shapes.vision_tokens


@pytest.mark.parametrize("family", FIXED)
def test_the_number_of_tokens_that_a_processor_s_file_leaves_out_is_that_of_transformers(family: str) -> None:
    key, value = FIXED[family]
    processor = PROCESSOR_MAPPING[type(CONFIG_MAPPING[family]())]
    assert inspect.signature(processor.__init__).parameters[key].default == value


def test_heads_wider_than_their_share_of_the_width_are_counted(tmp_path: Path) -> None:
    sizes = family_sizes(write_model_folder(tmp_path / "gemma", "gemma-3-4b-it"), "gemma3", DATA)
    assert (sizes.shapes.query_width, sizes.shapes.key_width) == (2048, 1024)
    assert sizes.head == sizes.count("language_model.embed_tokens.") == 262208 * 2560
    assert sizes.count("head.") == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"text_config": {"model_type": "opt"}}, "`text_config.model_type` opt is not known"),
        ({"vision_config": {"model_type": "vit"}}, "`vision_config.model_type` vit is not known"),
        (
            {"text_config": {"model_type": "llama", "attention_bias": True}},
            "`text_config.attention_bias` is not",
        ),
    ],
)
def test_what_is_not_known_is_refused(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", "llava-1.5-7b-hf")
    change_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=why):
        family_sizes(folder, "llava", DATA)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma4"}))
    with pytest.raises(CheckpointError, match="the sizes of gemma4 models are not known"):
        family_sizes(folder, "gemma4", DATA)
