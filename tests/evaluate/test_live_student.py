"""The student of an engine that answers: as its export does, with its own weights, and unchanged by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import alignkd
from alignkd.config import load_config
from alignkd.config.schema import Config, DataSection, DataSource, LoraSection, ModelSection, StudentSection
from alignkd.errors import CheckpointError
from alignkd.evaluate.answering_model import AnsweringModel, Request
from alignkd.evaluate.generation import Decoding
from alignkd.evaluate.live_student import live_student
from alignkd.models.building import BuildOptions, full_tensors
from alignkd.models.families.interface import VisionLanguageModel
from alignkd.models.families.mobilevlm import public_name
from alignkd.models.families.mobilevlm_loading import model_of_tensors
from alignkd.models.loading import fingerprint, load_model
from alignkd.models.lora import add_lora, merged
from tests import tiny, vlm

SHORT = Decoding(max_new_tokens=6)


def config_of(folder: Path, lora: LoraSection | None = None) -> Config:
    return Config(
        model=ModelSection(student=str(folder)),
        data=DataSection(sources=[DataSource(file="x")]),
        student=StudentSection(lora=lora),
    )


def in_training(folder: Path) -> VisionLanguageModel:
    """As an engine holds it."""
    student = load_model(folder, BuildOptions(torch.float32))
    student.enable_gradient_checkpointing()
    return student.train()


def asked(model: AnsweringModel, picture: Path) -> list[Request]:
    return [model.request(picture, "what colour"), model.request(None, "the answer is")]


def memory(tensors: Sequence[torch.Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize("family", ["mobilevlm", *vlm.FAMILIES])
def test_a_live_student_answers_as_its_export_with_its_own_weights(family: str, tmp_path: Path) -> None:
    vlm.write_images(tmp_path)
    folder = tiny.STUDENT if family == "mobilevlm" else vlm.folder(family)
    student = in_training(folder)
    before = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    live, exported = live_student(config_of(folder))(student), alignkd.load(folder)
    answers = live.answers(asked(live, tmp_path / "0.png"), SHORT)
    assert answers == exported.answers(asked(exported, tmp_path / "0.png"), SHORT)
    assert any(answers)
    assert live.fingerprint() == exported.fingerprint()
    whole = live.model if family == "mobilevlm" else live.whole  # type: ignore[attr-defined]
    assert memory(list(whole.parameters())) == memory(list(student.parameters()))
    assert {name: parameter.requires_grad for name, parameter in student.named_parameters()} == before
    assert all(module.training for module in student.modules())


@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "text_config"])
def test_a_live_student_ends_where_the_settings_of_its_folder_say_and_reads_them_once(
    place: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(vlm.folder("smolvlm"), tmp_path / "folder")
    file = folder / ("config.json" if place == "text_config" else place)
    settings = json.loads(file.read_text())
    ends = {"eos_token_id": [7, 8, 9]}
    if place == "text_config":
        settings.pop("eos_token_id", None)
        settings[place] |= ends
    else:
        settings |= ends
    if place != "generation_config.json":
        (folder / "generation_config.json").unlink()
    file.write_text(json.dumps(settings))
    student, exported = in_training(folder), alignkd.load(folder)
    around = live_student(config_of(folder))
    shutil.rmtree(folder)
    first, second = around(student), around(student)
    assert first._ends == second._ends == exported._ends  # type: ignore[attr-defined]
    assert first._ends >= {7, 8, 9}  # type: ignore[attr-defined]
    request = first.request(None, "the answer is")
    assert first.answers([request], SHORT) == exported.answers([request], SHORT)


@pytest.mark.parametrize("family", ["mobilevlm", "smolvlm"])
def test_a_student_with_a_tensor_of_another_name_is_an_error_and_does_not_answer(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.STUDENT if family == "mobilevlm" else vlm.folder(family)
    student, around = in_training(folder), live_student(config_of(folder))

    def renamed(*_: object) -> Iterator[tuple[str, torch.Tensor]]:
        (first, value), *others = full_tensors(student)
        yield from ((f"{first}s", value), *others)

    monkeypatch.setattr("alignkd.evaluate.live_student.full_tensors", renamed)
    with pytest.raises(CheckpointError, match=r"2 tensors of the student do not fit\n  missing: .*\n  unexp"):
        around(student)


def test_a_rank_without_room_for_a_clone_still_takes_part_in_the_gather_of_every_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a student that ZeRO-3 shards."""

    class TooLarge:
        def clone(self) -> torch.Tensor:
            raise torch.OutOfMemoryError("the first one")

    class Small:
        def clone(self) -> torch.Tensor:
            pytest.fail("a clone after the failure")

    gathers: list[str] = []

    def gathered(*_: object) -> Iterator[tuple[str, Any]]:
        for name, value in (("a", torch.ones(1)), ("b", TooLarge()), ("c", Small()), ("d", Small())):
            gathers.append(name)
            yield name, value

    student = in_training(tiny.STUDENT)
    student.head.weight.ds_id = 0
    monkeypatch.setattr("alignkd.evaluate.live_student.full_tensors", gathered)
    with pytest.raises(torch.OutOfMemoryError, match="the first one"):
        live_student(config_of(tiny.STUDENT))(student)
    assert gathers == ["a", "b", "c", "d"]


def test_answering_leaves_the_forward_of_training_as_it_was() -> None:
    student, batch = in_training(tiny.STUDENT), tiny.batch_of("v1")
    before = student(batch).hidden_BLD
    live = live_student(config_of(tiny.STUDENT))(student)
    live.answers(asked(live, tiny.FOLDER / "image_0.png"), SHORT)
    after = student(batch)
    assert after.hidden_BLD.equal(before)
    assert after.first_layer.query_BHLE.requires_grad


def test_the_adapters_of_a_lora_student_are_merged_for_its_answers() -> None:
    lora = LoraSection(rank=2, alpha=4)
    student = in_training(tiny.STUDENT)
    add_lora(student, lora, 0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tensors = merged(dict(student.named_parameters()), lora)
    published = {public_name(name): value for name, value in tensors.items()}
    expected = model_of_tensors(student.config, published, BuildOptions(torch.float32), "here")  # type: ignore[arg-type]
    live = live_student(config_of(tiny.STUDENT, lora))(student)
    assert live.fingerprint() == fingerprint(expected)
    assert live.fingerprint() != alignkd.load(tiny.STUDENT).fingerprint()


def test_a_live_student_has_the_image_options_of_the_training(tmp_path: Path) -> None:
    path = vlm.write_configuration(tmp_path, "smolvlm")
    options = {"size": {"longest_edge": 32}}
    config = load_config(path)
    (source,) = config.data.sources
    sources = [source.model_copy(update={"image_options": options})]
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})
    live = live_student(config)(in_training(vlm.folder("smolvlm")))
    assert live.answer_settings() == {"image_options": '{"size": {"longest_edge": 32}}'}
