"""What a pair of transformers' models must agree in, compared by files before a run is queued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from alignkd.config import load_config
from alignkd.config.schema import DataSource, ModelSection
from alignkd.data.records import BadSample, parse_sample
from alignkd.errors import UserError
from alignkd.models.agreement import check_agreement, check_templates
from alignkd.models.encoding import chat_encoder, student_encoder
from tests import tiny, vlm
from tests.launcher.cli.command import alignkd
from tests.model_folders import change_json


def pair(teacher: Path, student: Path) -> list[str]:
    return check_agreement(ModelSection(teacher=str(teacher), student=str(student)), 6)


def changed(tmp_path: Path, family: str = "llava") -> Path:
    return Path(shutil.copytree(vlm.folder(family, "teacher"), tmp_path / "teacher"))


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_a_pair_agrees_although_shapes_differ(family: str) -> None:
    assert pair(vlm.folder(family, "teacher"), vlm.folder(family)) == []


def test_families_are_not_mixed() -> None:
    (problem,) = pair(vlm.folder("llava", "teacher"), vlm.folder("idefics3"))
    assert problem == "teacher and student are of different families: llava and idefics3"
    (problem,) = pair(tiny.TEACHER, vlm.folder("llava"))
    assert problem == "teacher and student are of different families: mobilevlm and llava"


def test_other_tokenizers_templates_and_processors_are_named(tmp_path: Path) -> None:
    teacher = changed(tmp_path)
    change_json(teacher / "tokenizer.json", version="2.0")
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    processor = json.loads((teacher / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"shortest_edge": 99}
    (teacher / "processor_config.json").write_text(json.dumps(processor))
    problems = pair(teacher, vlm.folder("llava"))
    assert [problem.removeprefix("teacher and student have different ") for problem in problems] == [
        "tokenizers (tokenizer.json)",
        "chat templates",
        "`size` in their processors, and they do not see the same part of an image",
    ]


def test_models_whose_logits_are_capped_differently_do_not_agree(tmp_path: Path) -> None:
    teacher = changed(tmp_path, "gemma4")
    config = json.loads((teacher / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = 30.0
    (teacher / "config.json").write_text(json.dumps(config))
    (problem,) = pair(teacher, vlm.folder("gemma4"))
    assert problem == "teacher and student have different `text_config.final_logit_softcapping`"


def test_an_older_folder_with_a_file_of_its_own_for_images_agrees(tmp_path: Path) -> None:
    teacher = changed(tmp_path)
    processor = json.loads((teacher / "processor_config.json").read_text())
    (teacher / "preprocessor_config.json").write_text(json.dumps(processor.pop("image_processor")))
    (teacher / "processor_config.json").write_text(json.dumps(processor))
    assert pair(teacher, vlm.folder("llava")) == []


def test_missing_files_are_named(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json"):
        teacher = changed(tmp_path / name)
        (teacher / name).unlink()
        (problem,) = pair(teacher, vlm.folder("llava"))
        assert name in problem


def test_templates_and_packing_follow_the_family(tmp_path: Path) -> None:
    path = vlm.write_configuration(tmp_path, "llava")
    assert check_templates(load_config(path)) == []
    assert check_templates(load_config(path, ["training.packing=true"])) == []
    path = vlm.write_configuration(tmp_path, "qwen3_vl")
    wrong = load_config(path, ["data.sources.0.template=v1", "training.packing=true"])
    assert check_templates(wrong) == [
        "data.sources[0].template = v1: valid for these models: chat",
        "training.packing = true: samples of qwen3_vl are padded; valid: false",
    ]
    section = f"model={{teacher: {tiny.TEACHER}, student: {tiny.STUDENT}}}"
    mobile = load_config(path, [section, "data.sources.0.image_options={size: {longest_edge: 3}}"])
    assert len(check_templates(mobile)) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"model_type": "jamba"}, "samples of a jamba are padded"),
        ({"sliding_window": 64}, "samples of a language model with sliding windows are padded"),
        ({"sliding_window": 64, "use_sliding_window": False}, None),
        ({"model_type": "mistral"}, "samples of a language model with sliding windows are padded"),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"attention_dropout": 0.1}, "samples of a language model with attention dropout are padded"),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_packing_is_refused_for_language_models_that_mix_samples(
    tmp_path: Path, text: dict[str, object], reason: str | None, role: str
) -> None:
    folder = Path(shutil.copytree(vlm.folder("llava", role), tmp_path / role))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(config))
    path = vlm.write_configuration(tmp_path, "llava")
    packed = load_config(path, ["training.packing=true", f"model.{role}={folder}"])
    assert check_templates(packed) == (
        [] if reason is None else [f"training.packing = true: {reason}; valid: false"]
    )


def test_a_processor_that_only_behaves_differently_is_noticed_at_the_start(tmp_path: Path) -> None:
    """Its files are the same, but for a key that the comparison of files does not look at."""
    path = vlm.write_configuration(tmp_path, "llava")
    teacher = changed(tmp_path)
    change_json(teacher / "config.json", image_token_index=7)
    with pytest.raises(UserError, match="encodes a sample differently"):
        student_encoder(load_config(path, [f"model.teacher={teacher}"]))


def test_a_launch_refuses_by_name_and_without_torch(tmp_path: Path) -> None:
    path = vlm.write_configuration(tmp_path, "llava")
    done = alignkd("launch", path, "--cpu", "--dry-run", "--backend", "local")
    assert done.returncode == 0, done.stderr
    assert done.is_light
    teacher = changed(tmp_path)
    change_json(teacher / "config.json", model_type="paligemma")
    done = alignkd(
        "launch",
        path,
        "--name",
        "b",
        "--set",
        f"model.teacher={teacher}",
        "--cpu",
        "--dry-run",
        "--backend",
        "local",
    )
    assert done.returncode == 2
    assert "paligemma is refused" in " ".join((done.stdout + done.stderr).split())
    assert done.is_light
    assert not (tmp_path / "runs" / "b").exists()


@pytest.mark.parametrize("text", ["say <|im_end|> now", "a <video> here"])
@pytest.mark.parametrize("speaker", [0, 1])
def test_special_tokens_in_a_text_make_a_bad_sample(text: str, speaker: int) -> None:
    record = vlm.RECORDS[1] | {"conversations": [dict(one) for one in vlm.RECORDS[1]["conversations"]]}
    record["conversations"][speaker]["value"] = text
    encoder = chat_encoder(vlm.folder("smolvlm"), 10**6)
    with pytest.raises(BadSample, match="special token in text"):
        encoder.check(parse_sample(record, "x", 0, 0), DataSource(file="x", template="chat"))
