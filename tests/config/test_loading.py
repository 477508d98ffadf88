from pathlib import Path

import pytest

from alignkd.config import dump_config, load_config
from alignkd.errors import EXIT_USER_ERROR, ConfigError

from .conftest import BASE

STAGED = (
    BASE
    + """
training: {epochs: 3, learning_rate: 1e-3}
stages:
  pretrain:
    run: {name: first}
    training: {learning_rate: 2e-5}
    data:
      sources: [{file: data/b.json, template: plain}]
  finetune: {run: {name: second}}
"""
)


def problems_of(path: Path, overrides=(), stage=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, stage)
    assert caught.value.exit_code == EXIT_USER_ERROR
    assert caught.value.source == str(path)
    return caught.value.problems


def test_defaults_and_paths_relative_to_the_file(write, tmp_path, monkeypatch) -> None:
    path = write(BASE)
    monkeypatch.chdir("/")
    config = load_config(path)
    assert config.model.teacher == str(tmp_path / "models/teacher")
    assert config.data.sources[0].file == str(tmp_path / "data/a.json")
    assert config.data.sources[0].image_folder == str(tmp_path / "images")
    assert config.run.folder == str(tmp_path / "runs")
    assert config.distillation.vision_focus_weight == 0.1
    assert config.stages == {}


def test_scratch_and_absolute_paths_are_left_alone(write) -> None:
    text = "model: {teacher: /t, student: scratch, student_config: /c, vision_tower: ../v}\n"
    config = load_config(write(text + "data: {sources: [{file: /d/../a.json}]}"))
    assert (config.model.student, config.model.teacher) == ("scratch", "/t")
    assert config.data.sources[0].file == "/a.json"
    assert Path(config.model.vision_tower).is_absolute()


def test_overrides_are_yaml_scalars_and_win_over_stage_and_file(write) -> None:
    overrides = [
        "training.learning_rate=1e-4",
        "training.max_steps=5",
        "distillation.weights.vision=0",
        "data.sources.0.weight=0.5",
        "slurm.time_limit=12:00:00",
        "run.name=xy",
        "model.vision_tower=",
    ]
    config = load_config(write(STAGED), overrides, "pretrain")
    assert config.training.learning_rate == 1e-4
    assert config.training.max_steps == 5
    assert config.training.epochs == 3
    assert config.distillation.weights.vision == 0
    assert config.data.sources[0].weight == 0.5
    assert config.slurm.time_limit == "12:00:00"
    assert config.run.name == "xy"
    assert config.model.vision_tower is None


def test_paths_of_overrides_are_relative_to_the_current_folder(write, tmp_path, monkeypatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(write(BASE), ["model.student=mine", "data.sources=[{file: b.json}]"])
    assert config.model.student == str(elsewhere / "mine")
    assert config.data.sources[0].file == str(elsewhere / "b.json")
    assert config.model.teacher == str(tmp_path / "models/teacher")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training", "expected key=value"),
        ("=3", "expected key=value"),
        ("training..seed=3", "expected key=value"),
        ("training.seed=[1", "not valid YAML"),
        ("data.sources.7.weight=1", "no section or list there"),
        ("model.student.deeper=1", "no section or list there"),
        ("stages.pretrain.training.seed=1", "without `stages.NAME`"),
        ("training.lerning_rate=1", "did you mean training.learning_rate"),
    ],
)
def test_a_bad_override_is_reported(write, override: str, message: str) -> None:
    assert any(message in problem for problem in problems_of(write(BASE), [override]))


def test_stage_is_merged_section_by_section_and_lists_are_replaced(write, tmp_path) -> None:
    config = load_config(write(STAGED), (), "pretrain")
    assert (config.run.name, config.training.epochs, config.training.learning_rate) == ("first", 3, 2e-5)
    assert [source.file for source in config.data.sources] == [str(tmp_path / "data/b.json")]
    assert load_config(write(STAGED), (), "finetune").training.learning_rate == 1e-3


def test_a_missing_or_unknown_stage_lists_the_valid_ones(write) -> None:
    assert problems_of(write(STAGED)) == [
        "this file has stages but none was chosen; valid: --stage with one of: pretrain, finetune"
    ]
    (problem,) = problems_of(write(STAGED), (), "pretrian")
    assert "valid: pretrain, finetune" in problem
    assert "did you mean pretrain" in problem
    assert problems_of(write(BASE), (), "pretrain") == [
        "--stage pretrain: this file has no stages; omit --stage"
    ]


def test_stages_that_were_not_chosen_are_validated_too(write) -> None:
    text = STAGED + "  other: {training: {epoch: 3}, data: {max_length: x}, stages: {}}\n"
    problems = problems_of(write(text), (), "finetune")
    assert len(problems) == 3
    assert any(problem.startswith("stages.other.training.epoch = 3: unknown key") for problem in problems)
    assert any(problem.startswith("stages.other.data.max_length = x") for problem in problems)
    assert any(problem.startswith("stages.other.stages") for problem in problems)


def test_a_key_missing_in_one_stage_names_the_stage(write) -> None:
    text = "data: {sources: [{file: a.json}]}\nmodel: {teacher: t}\nstages: {a: {model: {student: s}}, b: {}}"
    (problem,) = problems_of(write(text), (), "b")
    assert problem.startswith("model.student is missing")
    assert problem.endswith("[stage b]")


def test_all_problems_are_reported_at_once_with_value_limits_and_nearest_key(write) -> None:
    text = """
learning_rate: 1e-4
model: {student: scratch, teacher: t}
data:
  sources:
    - {file: a.json, templat: v1, weight: true, image_aspect_ratio: pud}
    - 3
  max_length: 7
training: {learning_rate: "1e-4", precision: bf8, projector_learning_rate: .nan, seed: 1.5}
student: {zero_stage: true}
checkpoint: 4
distillation: {weights: {attention: .inf}, top_k: 0}
foo: 2
"""
    problems = problems_of(write(text))
    starts = [
        "learning_rate = 0.0001: unknown key; did you mean training.learning_rate: a number, more than 0",
        "data.sources[0].templat = v1: unknown key; did you mean data.sources[].template: one of plain, v1",
        "data.sources[0].weight = true: not valid; valid: a number, more than 0, at most 1000",
        "data.sources[0].image_aspect_ratio = pud: not valid; valid: one of pad, square",
        "data.sources[1] = 3: not valid",
        "data.max_length = 7: not valid; valid: a whole number, at least 8 (default 2048",
        "training.learning_rate = '1e-4': not valid; valid: a number",
        "training.precision = bf8: not valid; valid: one of bf16, fp16, fp32 (default bf16)",
        "training.projector_learning_rate = .nan: not valid",
        "training.seed = 1.5: not valid; valid: a whole number",
        "student.zero_stage = true: not valid",
        "checkpoint = 4: not valid; valid: a section",
        "distillation.weights.attention = .inf: not valid",
        "distillation.top_k = 0: not valid",
        "foo = 2: unknown key; valid here: run, model,",
        # combinations of sections that are valid on their own
        "model.student_config is missing",
        "model.vision_tower is missing",
    ]
    for start in starts:
        assert any(problem.startswith(start) for problem in problems), start
    assert len(problems) == len(starts)


@pytest.mark.parametrize("text", ["[1, 2]", "just text", "3"])
def test_a_file_that_is_not_a_mapping_is_refused(write, text: str) -> None:
    assert problems_of(write(text)) == ["the file must be a mapping of sections (`model: ...`, `data: ...`)"]


def test_an_empty_file_reports_the_sections_without_defaults(write) -> None:
    problems = problems_of(write(""))
    assert [problem.partition(" ")[0] for problem in problems] == ["model", "data"]


@pytest.mark.parametrize("stages", ["3", "[a]", "{a: 3}"])
def test_stages_that_are_not_sections_are_refused(write, stages: str) -> None:
    assert any("section of sections" in text for text in problems_of(write(BASE + f"stages: {stages}")))


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "-x", "a\\nb"])
def test_run_names_cannot_leave_their_folder(write, name: str) -> None:
    assert any("run.name" in text for text in problems_of(write(BASE + f'run: {{name: "{name}"}}')))


def test_control_characters_in_paths_are_refused(write) -> None:
    assert any("model.teacher" in text for text in problems_of(write(BASE), ['model.teacher="a\\nb"']))


def test_a_dumped_configuration_reads_back_equal(write, tmp_path) -> None:
    config = load_config(write(STAGED), ["training.learning_rate=1.5e-7", 'slurm.account="0x1f"'], "pretrain")
    saved = tmp_path / "elsewhere" / "config.yaml"
    saved.parent.mkdir()
    saved.write_text(dump_config(config))
    assert load_config(saved) == config


def test_override_of_a_number_like_text_stays_text_when_quoted(write) -> None:
    assert load_config(write(BASE), ['slurm.account="007"']).slurm.account == "007"


@pytest.mark.parametrize(
    ("tracking", "problem"),
    [
        ("{wandb: {}}", "tracking.wandb.project is missing"),
        ("{wandb: {project: a/b}}", "tracking.wandb.project = a/b"),
        ("{wandb: {project: a, mode: off}}", "valid: one of online, offline"),
        ("{wandb: {project: a, key: x}}", "tracking.wandb.key"),
        ("{tensorboard: yes please}", "tracking.tensorboard = yes please"),
    ],
)
def test_trackers_have_a_strict_schema(write, tracking: str, problem: str) -> None:
    (found,) = problems_of(write(f"{BASE}tracking: {tracking}\n"))
    assert problem in found
