import pytest

from alignkd.config import load_config, warnings_of
from alignkd.config.presets import PAIRS, PRESETS, preset_text, write_preset
from alignkd.errors import UserError

STAGES: dict[str, list[str | None]] = {
    **{name: [None] for name in PAIRS},
    "sample": ["teacher", "student", "baseline"],
    "short-3b": ["pretrain", "finetune"],
    "short": ["pretrain", "finetune"],
    "long": ["pretrain", "finetune"],
}


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in PRESETS for stage in STAGES[name]])
def test_every_stage_is_valid_without_warnings(tmp_path, name: str, stage: str | None) -> None:
    write_preset(name, tmp_path / "alignkd.yaml")
    config = load_config(tmp_path / "alignkd.yaml", (), stage)
    assert warnings_of(config) == []
    assert "#" in preset_text(name)


@pytest.mark.parametrize(("name", "length"), [("short", 512), ("long", 2048)])
def test_presets_have_the_hyper_parameters_of_the_paper(tmp_path, name: str, length: int) -> None:
    write_preset(name, tmp_path / "a.yaml")
    first = load_config(tmp_path / "a.yaml", (), "pretrain")
    second = load_config(tmp_path / "a.yaml", (), "finetune")
    for config in (first, second):
        assert config.data.max_length == length
        assert config.training.warmup_ratio == 0.03
        assert config.training.weight_decay == 0
        assert config.training.epochs == 1
        assert config.training.gradient_checkpointing
        assert config.student.zero_stage == 2
        assert config.training.global_batch_size % (8 * config.training.micro_batch_size) == 0
        assert config.distillation.vision_focus_weight == 0.1
    assert (first.training.global_batch_size, second.training.global_batch_size) == (256, 128)
    assert (first.training.learning_rate, first.training.projector_learning_rate) == (2e-5, 1e-3)
    assert (second.training.learning_rate, second.training.projector_learning_rate) == (4e-5, None)
    assert (first.data.sources[0].template, first.data.sources[0].image_aspect_ratio) == ("plain", "square")
    assert (second.data.sources[0].template, second.data.sources[0].image_aspect_ratio) == ("v1", "pad")
    assert second.model.student == f"{first.run.folder}/{first.run.name}/student"


def test_the_3b_student_differs_from_the_small_one_in_its_folders_only(tmp_path) -> None:
    write_preset("short-3b", tmp_path / "a.yaml")
    write_preset("short", tmp_path / "b.yaml")
    for stage, student in (
        ("pretrain", "checkpoints/MobileLLaMA-2.7B-Chat"),
        ("finetune", "runs/short-3b-pretrain/student"),
    ):
        ours, theirs = (load_config(tmp_path / f"{name}.yaml", (), stage) for name in "ab")
        assert ours.model.student == str(tmp_path / student)
        assert ours.model.teacher == theirs.model.teacher
        assert ours.training == theirs.training
        assert ours.distillation == theirs.distillation
    assert "1.4B" not in preset_text("short-3b")


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_has_its_models_and_what_families_need(name: str, tmp_path) -> None:
    write_preset(name, tmp_path / "a.yaml")
    config = load_config(tmp_path / "a.yaml")
    pair = PAIRS[name]
    folders = tmp_path / "checkpoints" / pair.teacher, tmp_path / "checkpoints" / pair.student
    assert (config.model.teacher, config.model.student) == tuple(map(str, folders))
    assert config.run.name == name
    assert config.data.sources[0].template == "chat"
    assert not config.training.packing
    assert pair.note in preset_text(name)


def test_an_existing_file_is_kept_unless_forced(tmp_path) -> None:
    out = tmp_path / "a.yaml"
    out.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        write_preset("sample", out)
    assert out.read_text() == "mine"
    write_preset("sample", out, force=True)
    assert out.read_text() == preset_text("sample")


def test_an_unknown_preset_and_an_unwritable_place_are_refused(tmp_path) -> None:
    with pytest.raises(UserError) as refused:
        preset_text("shrt")
    first, second, *known = str(refused.value).splitlines()
    assert (first, second) == ("--preset shrt: no such preset; did you mean short?", "valid:")
    assert known == [f"- {name}: {text}" for name, text in PRESETS.items()]
    with pytest.raises(UserError, match=r"--preset \.\./sample: no such preset"):
        preset_text("../sample")
    with pytest.raises(UserError, match="cannot be written"):
        write_preset("sample", tmp_path / "missing" / "a.yaml")
