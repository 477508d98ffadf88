import pytest

from alignkd.config import load_config
from alignkd.config.combinations import divisors
from alignkd.config.slurm_section import time_limit_seconds
from alignkd.errors import ConfigError

from .conftest import BASE

CACHED = ("teacher.placement=cached", "teacher.cache=/c")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.teacher="], "model.teacher is missing: distillation.enabled"),
        (["model.student=scratch"], "model.student_config is missing"),
        (["model.student=scratch"], "model.vision_tower is missing"),
        (["distillation.attention_rows=prompt_only", "data.sources.0.template=plain"], "needs a prompt"),
        (["training.global_batch_size=10"], "valid micro-batch sizes: 1, 2, 5, 10"),
        (["student.offload=true", "student.zero_stage=0"], "student.zero_stage 1, 2 or 3"),
        (["student.train=[]"], "student.train = [] leaves nothing to train"),
        (["student.train=[projector]", "student.lora={}"], "student.lora adapts the language model"),
        (["student.lora.rank=4", "training.compile_layers=true"], "does not work with student.lora"),
        (["training.precision=fp16", "student.zero_stage=0"], "valid: stage 1, 2 or 3"),
        (["training.compile_layers=true", "student.zero_stage=3"], "here it shards all"),
        (["logging.gradient_norms_every=5", "student.zero_stage=3"], "valid: stage 0, 1 or 2"),
        (["distillation.balance=gradient", "student.zero_stage=3"], "valid: stage 0, 1 or 2, or dist"),
        (["distillation.balance=gradient", "training.precision=fp16"], "valid: bf16 or fp32, or dist"),
        (
            ["distillation.balance=learned", "distillation.weights={attention: 0, vision: 0, logits: 0}"],
            "are all 0",
        ),
        (["distillation.weights={attention: 0, vision: 0, logits: 0}"], "are all 0"),
        (
            [*CACHED, "teacher.cache_form=top_k"],
            "teacher.cache_form = top_k does not work with distillation.divergence = reverse_kl, which",
        ),
        (
            [*CACHED, "teacher.cache_form=top_k", "distillation.divergence=js"],
            "valid: distillation.divergence = forward_kl, or teacher.cache_form = exact or fp8",
        ),
        (["slurm.time_limit=5:00"], "slurm.signal_seconds = 300 is not shorter"),
    ],
)
def test_conflicting_settings_are_errors(write, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(BASE), overrides)
    assert any(message in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    "overrides",
    [
        ["distillation.enabled=false", "model.teacher="],
        ["model.student=scratch", "model.student_config=c", "model.vision_tower=v"],
        ["distillation.attention_rows=prompt_only"],
        ["distillation.balance=learned", "student.zero_stage=3", "training.precision=fp16"],
        ["distillation.balance=gradient", "student.zero_stage=3", "distillation.enabled=false"],
        ["training.compile_layers=true"],
        ["training.compile_layers=true", "student.zero_stage=3", "teacher.placement=replicated"],
        [
            "distillation.attention_rows=prompt_only",
            "data.sources.0.template=plain",
            "distillation.enabled=false",
        ],
        ["student.offload=true", "student.zero_stage=1"],
        ["student.train=[]", "training.train_vision_tower=true"],
        ["student.train=[projector]"],
        ["student.lora={}", "student.train=[language_model]"],
        ["distillation.weights={attention: 0, vision: 0, logits: 0}", "distillation.enabled=false"],
        ["slurm.time_limit=5:01"],
        ["training.micro_batch_size=7", "training.tokens_per_micro_batch=4096"],
    ],
)
def test_compatible_settings_are_accepted(write, overrides: list[str]) -> None:
    load_config(write(BASE), overrides)


def test_divisors_are_complete_and_ascending() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(1) == [1]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:01", 3601), ("2-3", 183600), ("1-0:30", 88200), ("1-0:0:1", 86401)],
)
def test_slurm_time_limits_are_read_in_every_form(text: str, seconds: int) -> None:
    assert time_limit_seconds(text) == seconds


@pytest.mark.parametrize(
    ("evaluation", "problem"),
    [
        ("", "evaluation.every needs something to evaluate; valid: evaluation.sources"),
        (", task: sample, best: accuracy", "evaluation.task_data is missing: evaluation.task needs"),
        (", task: sample, task_data: /d", "evaluation.best = loss needs evaluation.sources"),
        (", sources: [{file: b.json}], best: accuracy", "evaluation.best = accuracy needs evaluation.task"),
    ],
)
def test_an_evaluation_needs_the_data_of_what_it_measures(write, evaluation: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(f"{BASE}evaluation: {{every: 5{evaluation}}}\n"))
    assert caught.value.problems[0].startswith(problem)


@pytest.mark.parametrize(
    "overrides",
    [
        [*CACHED, "distillation.divergence=forward_kl"],
        [*CACHED, "distillation.enabled=false"],
        ["teacher.placement=zero3"],  # no cache is read, which is a warning
    ],
)
def test_a_cache_of_tokens_is_for_forward_kl_and_only_a_run_that_reads_it_is_asked(
    write, overrides: list[str]
) -> None:
    assert load_config(write(BASE), ["teacher.cache_form=top_k", *overrides]).teacher.cache_top_k == 64


@pytest.mark.parametrize("tokens", ["0", "-3", "1025", "16.5", "all"])
def test_numbers_of_cached_tokens_that_make_no_sense_are_refused(write, tokens: str) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.cache_top_k"):
        load_config(write(BASE), [f"teacher.cache_top_k={tokens}"])


def test_held_out_data_need_a_teacher_that_runs_and_a_task_does_not(write) -> None:
    cached = BASE + "teacher: {placement: cached, cache: /c}\n"
    held_out = "evaluation: {every: 5, sources: [{file: data/b.json, image_folder: pictures}]}\n"
    with pytest.raises(ConfigError) as caught:
        load_config(write(cached + held_out))
    (problem,) = caught.value.problems
    assert problem.startswith("evaluation.sources need a teacher that runs")
    path = write(cached + "evaluation: {every: 5, task: sample, task_data: tests, best: accuracy}\n")
    assert load_config(path).evaluation.task_data == str(path.parent / "tests")


def test_held_out_sources_lie_beside_the_file_and_are_checked_where_they_are_used(write) -> None:
    held_out = "evaluation: {every: 5, sources: [{file: data/b.json, image_folder: pictures}]}\n"
    path = write(BASE + held_out)
    source = load_config(path).evaluation.sources[0]
    assert (source.file, source.image_folder) == (
        str(path.parent / "data/b.json"),
        str(path.parent / "pictures"),
    )
    prompt_only = "distillation: {attention_rows: prompt_only}\n"
    with pytest.raises(ConfigError, match="template `plain` has none"):
        load_config(write(BASE + prompt_only + held_out.replace("{file", "{template: plain, file")))
    unused = held_out.replace("{file", "{template: plain, file").replace("every: 5, ", "")
    assert load_config(write(BASE + prompt_only + unused)).evaluation.every is None
