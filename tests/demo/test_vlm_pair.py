"""The model folders of `make demo-vlm`: what a run needs, and the same steps for both students."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import alignkd
from alignkd.config import load_config, warnings_of
from alignkd.data.sample_task.digits import draw_grid, load_digit_sets
from alignkd.data.sample_task.questions import KINDS, draw_question, images_of
from alignkd.demo import vlm_pair
from alignkd.models.agreement import check_agreement, check_templates


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both folders, with the untrained teacher in place of the trained one."""
    out = tmp_path_factory.mktemp("demo")
    vlm_pair.main("teacher", out)
    (out / "runs" / "teacher").mkdir(parents=True)
    (out / "runs" / "teacher" / "student").symlink_to(out / "models" / "teacher")
    vlm_pair.main("student", out)
    return out


@pytest.mark.parametrize("stage", ["teacher", "student", "alone"])
def test_every_stage_is_valid_without_warnings(demo: Path, stage: str) -> None:
    config = load_config(demo / "alignkd.yaml", (), stage)
    assert warnings_of(config) == []
    assert check_agreement(config.model, config.distillation.top_k) == []
    assert check_templates(config) == []


def test_the_student_is_trained_alone_as_with_the_teacher(demo: Path) -> None:
    alone, distilled = (load_config(demo / "alignkd.yaml", (), stage) for stage in ("alone", "student"))
    assert alone.training == distilled.training
    assert alone.data == distilled.data
    assert alone.model.student == distilled.model.student
    assert not alone.training.train_vision_tower


def test_the_student_begins_with_the_teachers_tower_and_nothing_else_of_it(demo: Path) -> None:
    teacher, student = (
        AutoModelForImageTextToText.from_pretrained(demo / "models" / role).model
        for role in ("teacher", "student")
    )
    theirs = dict(teacher.vision_model.named_parameters())
    for name, value in student.vision_model.named_parameters():
        assert torch.equal(value, theirs[name]), name
    sizes = [sum(p.numel() for p in model.text_model.parameters()) for model in (teacher, student)]
    assert sizes[1] < 0.4 * sizes[0]


def test_an_image_takes_16_vision_tokens_and_a_position_or_a_digit_one_token(demo: Path) -> None:
    model = alignkd.load(demo / "models" / "student")
    request = model.request(Image.new("L", (32, 32)), "Which digit is top left?")
    ids = model.inputs(request)["input_ids"][0].tolist()
    assert ids.count(vlm_pair.SPECIAL.index(vlm_pair.IMAGE)) == 16
    assert len(ids) == 16 + 3 + 5 + 5  # separators, words, roles and ends
    tokenizer = model.encoder.tokenizer
    answer, caption = (tokenizer(text)["input_ids"] for text in ("7", "top left 7 top right 3"))
    assert len(caption) == 4
    assert answer == caption[1:2]
    random = np.random.default_rng(0)
    digits, _ = load_digit_sets(0)
    for kind in KINDS:
        for _ in range(30):
            grids = [draw_grid(digits, random) for _ in range(images_of(kind))]
            question = draw_question(kind, grids, random)
            for text in (question.text, question.answer):
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
