"""The models of `python -m alignkd.demo --phone`: llama.cpp can run them, and every stage can start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from alignkd.config import load_config, warnings_of
from alignkd.data.sample_task.digits import draw_grid, load_digit_sets, to_image
from alignkd.data.sample_task.tokenizer import VOCABULARY
from alignkd.demo import phone_models, phone_tower
from alignkd.export.gguf_vision import check_tower
from alignkd.models.agreement import check_agreement, student_model_config


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tower is hardly trained, and in the place of the teacher that a run makes is its shape."""
    out = tmp_path_factory.mktemp("demo")
    phone_models.main(out, steps=2)
    return out


def test_llama_cpp_can_run_both_models_and_every_stage_is_valid_without_warnings(demo: Path) -> None:
    untrained = (f"model.teacher={demo}/models/teacher", f"model.vision_tower={demo}/models/tower")
    teacher = load_config(demo / "alignkd.yaml", (), "teacher")
    student = load_config(demo / "alignkd.yaml", untrained, "student")
    for config in (teacher, student):
        assert warnings_of(config) == []
        shape = student_model_config(config.model)
        check_tower(shape, "demo")  # raises otherwise
        assert shape.vocab_size == VOCABULARY
    assert check_agreement(teacher.model, teacher.distillation.top_k) == []


def test_the_trained_part_of_the_tower_is_what_mobilevlm_reads(demo: Path) -> None:
    tower = CLIPVisionModel.from_pretrained(demo / "models" / "tower")
    pixels, _ = phone_tower.draw_batch(load_digit_sets(0)[0], np.random.default_rng(0), 2)
    with torch.inference_mode():
        read = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(phone_tower.patches(tower, pixels), read)


def test_pixels_are_those_of_clips_preprocessing(demo: Path) -> None:
    digits = load_digit_sets(0)[0]
    pixels, labels = phone_tower.draw_batch(digits, np.random.default_rng(0), 1)
    grid = draw_grid(digits, np.random.default_rng(0))
    processor = CLIPImageProcessorPil.from_pretrained(demo / "models" / "tower")
    expected = processor(to_image(grid).convert("RGB"), return_tensors="pt")["pixel_values"]
    assert (pixels - expected).abs().mean() < 0.01  # Pillow rounds to bytes, twice; they span 3.7
    assert labels.tolist() == list(grid.digits)


def test_a_cell_is_the_mean_of_its_own_patches() -> None:
    head = torch.nn.Linear(phone_tower.WIDTH, 10)
    values = torch.zeros(1, phone_tower.GRID, phone_tower.GRID, phone_tower.WIDTH)
    values[0, :12, 12:] = 1.0  # top right
    logits = phone_tower.cell_logits(head, values.flatten(1, 2))
    of_zeros, of_ones = (head(torch.full((phone_tower.WIDTH,), value)) for value in (0.0, 1.0))
    expected = torch.stack([of_zeros, of_ones, of_zeros, of_zeros])
    torch.testing.assert_close(logits, phone_tower.SHARPNESS * expected)


def test_a_few_steps_teach_the_tower_something() -> None:
    torch.manual_seed(0)
    digits = load_digit_sets(0)[0]
    tower = phone_tower.new_tower()
    head = phone_tower.train_tower(tower, digits, 0, 100)
    pixels, labels = phone_tower.draw_batch(digits, np.random.default_rng(1), 50)
    with torch.inference_mode():
        found = phone_tower.cell_logits(head, phone_tower.patches(tower, pixels)).argmax(dim=-1)
    assert (found == labels).float().mean() > 0.2  # of ten digits
