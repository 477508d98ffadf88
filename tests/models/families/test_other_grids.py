"""Pairs whose images are grids of different sizes: the loss, its gradients, and which pairs are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from alignkd.config import load_config
from alignkd.config.schema import DataSource, DistillationSection, ModelSection
from alignkd.data.batch import Batch
from alignkd.data.collate import ExpandedExample, collate
from alignkd.data.join import join
from alignkd.data.pair_encoder import PairEncoder, with_grids
from alignkd.data.records import parse_sample
from alignkd.engine import student_step
from alignkd.engine.student_step import StudentStep
from alignkd.errors import UserError
from alignkd.losses.attention import plain_attention_loss
from alignkd.losses.total import TERMS
from alignkd.losses.vision import focus_indices
from alignkd.models.adapters import seeded_adapters
from alignkd.models.agreement import check_agreement, check_templates, grid_notes, has_other_grids
from alignkd.models.building import BuildOptions
from alignkd.models.encoding import chat_encoder, pair_encoder
from alignkd.models.families.processors import read_processor
from alignkd.models.loading import load_model
from alignkd.models.other_grids import with_pixel_budget
from alignkd.teacher.lookahead import split_targets
from alignkd.teacher.targets import TeacherModel, on_students_grids
from tests import vlm, vlm_grids
from tests.engine.test_no_waiting import BlockingCopies
from tests.losses import resampling
from tests.models.families import reference

FP64 = BuildOptions(torch.float64)
TOP_K = 3
UNIT = (1.0,) * len(TERMS)
ALIGNMENT = (0.0, 0.0, 1.0, 1.0, 1.0)
SOURCE = DataSource(file="x", template="chat")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images")
    vlm.write_images(out)
    return out


def section(pair: vlm_grids.Pair) -> ModelSection:
    return ModelSection(teacher=str(pair.teacher), student=str(pair.student))


def encoded(family: str, images: Path, *numbers: int) -> tuple[PairEncoder, list[ExpandedExample]]:
    encoder = pair_encoder(section(vlm_grids.pair(family)), 10**6)
    assert isinstance(encoder, PairEncoder)
    source = SOURCE.model_copy(update={"image_folder": str(images)})
    return encoder, [
        encoder.encode(parse_sample(vlm.RECORDS[number], "x", 0, number), source) for number in numbers
    ]


def batch_of(family: str, images: Path, *numbers: int) -> Batch:
    encoder, examples = encoded(family, images, *numbers)
    return collate(examples, encoder.collate_settings(top_k=TOP_K))


def new_step(family: str) -> tuple[StudentStep, TeacherModel]:
    pair = vlm_grids.pair(family)
    teacher = TeacherModel(load_model(pair.teacher, FP64), TOP_K)
    student = load_model(pair.student, FP64)
    adapters = seeded_adapters(teacher.model.facts, student.facts, 0).double()
    return StudentStep(student, adapters, DistillationSection(top_k=TOP_K)), teacher


@pytest.mark.parametrize("family", vlm_grids.FAMILIES)
def test_all_terms_equal_the_float64_reference(family: str, images: Path) -> None:
    """Of a batch of samples with one, no and two images; also joined with others for the teacher."""
    pair = vlm_grids.pair(family)
    step, teacher = new_step(family)
    batch = batch_of(family, images, 0, 1, 2)
    assert batch.of_teacher is not None
    assert batch.grids != batch.of_teacher.grids
    head = teacher.model.head
    got = step(batch, UNIT, teacher(batch), head.cut(head.weight))
    wanted = dict.fromkeys(TERMS, 0.0)
    wholes = [reference.run_whole(folder, vlm.RECORDS, images) for folder in pair]
    for record, taught, learnt in zip(vlm.RECORDS, *wholes, strict=True):
        seen, found = (reference.find(folder, record, images) for folder in pair)
        grids = [reference.grids(folder, record, images) for folder in pair] if record["image"] else [[], []]
        with torch.no_grad():
            one = reference.sums(
                taught,
                learnt,
                found,
                step.adapters,
                vlm.token_count(),
                TOP_K,
                seen,
                list(zip(*grids, strict=True)),
            )
        wanted = {term: wanted[term] + one[term] for term in TERMS}
    for term, value in zip(TERMS, got.sums.tolist(), strict=True):
        assert value == pytest.approx(wanted[term], rel=1e-5), term
        assert value > 0.01, term

    parts = [batch_of(family, images, number) for number in (1, 0, 2)]
    for part, targets in zip(parts, split_targets(teacher(join(parts)), parts), strict=True):
        alone = teacher(part)
        for ours, theirs in zip(targets[:3], alone[:3], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
        if part.image_count:
            best = min(grid[0] * grid[1] for grid in part.grids)
            assert targets.focus_indices_IK[:, :best].equal(alone.focus_indices_IK[:, :best])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradients_equal_those_of_plain_losses_with_plainly_resampled_targets(
    family: str, images: Path
) -> None:
    step, teacher = new_step(family)
    batch = batch_of(family, images, 0, 2)
    theirs = batch.of_teacher
    assert theirs is not None
    head = teacher.model.head
    targets = teacher(batch)
    plain = TeacherModel(teacher.model, TOP_K)(theirs)
    block, tokens = torch.zeros_like(targets.block_IHMV), torch.zeros_like(targets.vision_tokens_IVD)
    for image, (grid, wanted) in enumerate(zip(theirs.grids, batch.grids, strict=True)):
        old, new = grid[0] * grid[1], wanted[0] * wanted[1]
        block[image, ..., :new] = resampling.attention(plain.block_IHMV[image, ..., :old], grid, wanted)
        tokens[image, :new] = resampling.tokens(plain.vision_tokens_IVD[image, :old], grid, wanted)
    assert batch.columns_IV is not None
    focus = focus_indices(block, TOP_K, batch.columns_IV >= 0)
    expected = plain._replace(block_IHMV=block, vision_tokens_IVD=tokens, focus_indices_IK=focus)
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]

    def gradients() -> list[torch.Tensor]:
        loss = step(batch, ALIGNMENT, used, head.cut(head.weight)).loss
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    used = targets
    ours = gradients()
    used = expected
    with patch.object(student_step, "fused_attention_loss", plain_attention_loss):
        wanted_gradients = gradients()
    assert sum(bool(gradient.any()) for gradient in wanted_gradients) > 8
    for got, right in zip(ours, wanted_gradients, strict=True):
        assert torch.allclose(got, right, rtol=1e-6, atol=1e-9)


def test_bringing_targets_to_the_students_grids_asks_nothing_of_the_device(images: Path) -> None:
    """Shown on the meta device, with images of different grids."""
    _, teacher = new_step("qwen3_vl")
    batch = batch_of("qwen3_vl", images, 0, 2)
    own = batch.of_teacher
    assert own is not None
    assert len(set(own.grids)) > 1
    targets = TeacherModel(teacher.model, TOP_K)(own)
    values = [value.to("meta") for value in (targets.block_IHMV, targets.vision_tokens_IVD)]
    with BlockingCopies() as copies:
        made = on_students_grids(*values, own.to("meta"), batch.to("meta"))
    assert copies.found == []
    assert {value.device.type for value in made} == {"meta"}
    assert [value.shape for value in made] == [value.shape for value in teacher(batch)[1:3]]


@pytest.mark.parametrize("family", vlm_grids.FAMILIES)
def test_vision_tokens_are_in_row_major_order(family: str, images: Path) -> None:
    """A change in the upper right of an image changes the token there most."""
    _, teacher = new_step(family)
    batch = batch_of(family, images, 0).of_teacher
    assert batch is not None
    (rows, columns), pixels = batch.grids[0], batch.pixel_values.clone()
    sides = batch.image_inputs.get("image_grid_thw")
    if sides is None:
        cell = pixels.shape[-1] // columns
        pixels[..., :cell, -cell:] += 1.0
    else:  # patches of the merged cell, which follow one another
        pixels[4 * (columns - 1) : 4 * columns] += 1.0
    with torch.no_grad():
        before, after = (
            teacher.model(replace(batch, pixel_values=values)).vision_tokens_IVD[0]
            for values in (batch.pixel_values, pixels)
        )
    assert len(before) == rows * columns
    assert (after - before).norm(dim=1).argmax() == columns - 1


def test_a_text_only_batch_keeps_the_teachers_own_blank_image(images: Path) -> None:
    batch = batch_of("llava", images, 1)
    assert batch.of_teacher is not None
    assert batch.of_teacher.pixel_values.shape[-1] == 42
    assert batch.pixel_values.shape[-1] == 28
    moved = batch.to("meta").of_teacher
    assert moved is not None
    assert moved.pixel_values.device.type == moved.input_ids_BL.device.type == "meta"
    _, teacher = new_step("llava")
    targets = teacher(batch)
    assert targets.block_IHMV.shape[0] == targets.vision_tokens_IVD.shape[0] == 0
    empty = collate([], encoded("llava", images)[0].collate_settings(top_k=TOP_K))
    assert teacher(empty).hidden_ND.shape[0] == 0


def test_text_that_the_processors_encode_differently_is_refused(images: Path) -> None:
    encoder, _ = encoded("llava", images)
    other = encoder._teacher.encode_images

    def changed(*arguments: object) -> ExpandedExample:
        example = other(*arguments)  # type: ignore[arg-type]
        return replace(example, ids=[*example.ids[:-1], 5])

    source = SOURCE.model_copy(update={"image_folder": str(images)})
    with (
        patch.object(encoder._teacher, "encode_images", changed),
        pytest.raises(UserError, match="encodes the text around an image differently"),
    ):
        encoder.encode(parse_sample(vlm.RECORDS[0], "x", 0, 0), source)


@pytest.mark.parametrize("family", ["internvl", "idefics3", "llava_onevision"])
def test_tiles_are_no_grid(family: str, images: Path) -> None:
    """Also where their tokens together could be a square."""
    encoder = chat_encoder(vlm.folder(family), 10**6)
    source = SOURCE.model_copy(update={"image_folder": str(images)})
    example = encoder.encode(parse_sample(vlm.RECORDS[2], "x", 0, 2), source)
    square = tuple(np.arange(16) for _ in example.columns)
    for columns in (example.columns, square):
        with_tiles = replace(example, columns=columns)
        assert len(with_tiles.inputs["pixel_values"]) > len(columns) or family == "llava_onevision"
        with pytest.raises(UserError, match="not one rectangular grid"):
            with_grids(with_tiles, "there")


@pytest.mark.parametrize("family", vlm_grids.FAMILIES)
def test_a_pair_with_one_grid_each_agrees_and_a_note_says_so(family: str) -> None:
    model = section(vlm_grids.pair(family))
    assert check_agreement(model, TOP_K) == []
    (note,) = grid_notes(model)
    assert "other grids of vision tokens" in note
    same = ModelSection(teacher=str(vlm.folder(family, "teacher")), student=str(vlm.folder(family)))
    assert grid_notes(same) == []


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llava", {"size": {"shortest_edge": 99}}, "they do not see the same part of an image"),
        ("llava", {"size": {"height": 28, "width": 28}}, "they do not see the same part of an image"),
        ("llava", {"size": {"longest_edge": 28}}, "valid: `size` as height and width, or `crop_size`"),
        ("internvl", {"size": vlm_grids.SQUARE}, "internvl cuts images into tiles; valid: max_patches = 1"),
        (
            "smolvlm",
            {"max_image_size": {"longest_edge": 42}},
            "smolvlm cuts images into tiles; valid: do_image_splitting = False",
        ),
        ("llava_onevision", {"size": vlm_grids.SQUARE}, "does not make one rectangular grid of an image"),
        ("gemma4", {"patch_size": 8}, "does not make one rectangular grid of an image"),
        ("llava_next", {"size": {"shortest_edge": 42}}, "does not make one rectangular grid of an image"),
    ],
)
def test_other_pairs_are_refused_with_the_reason(
    tmp_path: Path, family: str, settings: dict[str, object], reason: str
) -> None:
    teacher = Path(shutil.copytree(vlm.folder(family, "teacher"), tmp_path / "teacher"))
    vlm_grids.change_processor(teacher, **settings)
    (problem,) = check_agreement(ModelSection(teacher=str(teacher), student=str(vlm.folder(family))), TOP_K)
    assert problem.startswith(f"teacher and student have different `{next(iter(settings))}` in their")
    assert problem.endswith(reason)


@pytest.mark.parametrize(
    ("changes", "is_other"),
    [
        ({"min_pixels": 196, "max_pixels": 1764, "size": None}, False),  # the student's `size`
        ({"min_pixels": 196, "max_pixels": 1764, "size": {"shortest_edge": 1, "longest_edge": 2}}, False),
        ({"min_pixels": None}, False),
        ({"max_pixels": 3528}, True),
        ({"size": None}, True),
        ({"crop_size": 28}, True),
    ],
)
def test_a_qwen_processor_s_budget_of_pixels_is_compared_as_it_is_used(
    tmp_path: Path, changes: dict[str, object], is_other: bool
) -> None:
    """By transformers, too. Older files spell it otherwise, and their spelling wins; a key that only the
    teacher has counts."""
    teacher = Path(shutil.copytree(vlm.folder("qwen3_vl", "teacher"), tmp_path / "teacher"))
    vlm_grids.change_processor(teacher, **changes)
    model = ModelSection(teacher=str(teacher), student=str(vlm.folder("qwen3_vl")))
    assert has_other_grids(model) == is_other
    assert bool(check_agreement(model, TOP_K)) == ("crop_size" in changes)
    settings = json.loads((teacher / "processor_config.json").read_text())["image_processor"]
    used = read_processor(teacher).image_processor.size
    assert with_pixel_budget(settings)["size"] == {
        side: used[side] for side in ("shortest_edge", "longest_edge")
    }


def test_a_llava_may_have_images_of_one_height_and_width(tmp_path: Path) -> None:
    folders = [
        Path(shutil.copytree(vlm.folder("llava", role), tmp_path / role)) for role in ("teacher", "student")
    ]
    for folder, side in zip(folders, (42, 28), strict=True):
        vlm_grids.change_processor(folder, size={"height": side, "width": side}, do_center_crop=False)
    model = ModelSection(teacher=str(folders[0]), student=str(folders[1]))
    assert check_agreement(model, TOP_K) == []
    assert has_other_grids(model)
    for folder, side in zip(folders, (42, 28), strict=True):
        vlm_grids.change_processor(folder, size={"shortest_edge": side})
    (problem,) = check_agreement(model, TOP_K)
    assert "their images may keep their shape" in problem


def test_image_options_are_refused_as_they_would_go_to_both(tmp_path: Path) -> None:
    path = vlm.write_configuration(tmp_path, "llava")
    pair = vlm_grids.pair("llava")
    models = [f"model.teacher={pair.teacher}", f"model.student={pair.student}"]
    assert check_templates(load_config(path, models)) == []
    options = "data.sources.0.image_options={do_rescale: false}"
    (problem,) = check_templates(load_config(path, [*models, options]))
    assert problem.startswith("data.sources[0].image_options: they would go to both processors")
    assert check_templates(load_config(path, [*models, options, "distillation.enabled=false"])) == []
    assert check_templates(load_config(path, [options])) == []
