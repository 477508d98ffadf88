"""What is submitted for an evaluation, and what is refused. tests/slurm/test_evaluation.py runs the job."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alignkd.errors import AlignkdError, UserError
from alignkd.evaluate import gguf_limits
from alignkd.evaluate.options import EvalOptions, ModelChoice, read_options
from launcher.backends.base import QueuedJob
from launcher.commands import evaluate_job
from launcher.commands.evaluate_job import JobSize, submit_evaluation
from tests import tiny
from tests.evaluate.questions import options, write_questions
from tests.launcher.render.test_job_scripts import directives


class Queue:
    """In place of Slurm: the queue that it shows, and the folders whose job was submitted."""

    jobs: list[QueuedJob] | None = []
    problems: tuple[str, ...] | None = ()  # None: those of the container, as they are

    def __init__(self) -> None:
        self.submitted: list[Path] = []

    def refusals(self, _slurm: object, _nodes: int, _scripts: object, container: list[str]) -> list[str]:
        return container if self.problems is None else list(self.problems)

    def submit(self, out: Path) -> str:
        self.submitted.append(out)
        return "7"


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Queue:
    queue = Queue()
    monkeypatch.setattr(evaluate_job, "slurm_is_installed", lambda: True)
    monkeypatch.setattr(evaluate_job, "script_problems", queue.refusals)
    monkeypatch.setattr(evaluate_job, "queued_jobs", lambda _: queue.jobs)
    monkeypatch.setattr(evaluate_job, "submit", queue.submit)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "site"))
    return queue


@pytest.fixture
def asked(tmp_path: Path) -> EvalOptions:
    write_questions(tmp_path / "data" / "own.json", "abcde")
    return options(tmp_path / "data", tmp_path / "out", as_json=True)


def submitted(asked: EvalOptions, cpu: bool = False, gpus: int | None = 4, **given: str) -> dict[str, str]:
    """The directives of the job."""
    job = submit_evaluation(asked, JobSize(2, gpus), given.get("partition"), given.get("time"), cpu)
    assert job == "7"
    return directives((Path(asked.out) / "job.sbatch").read_text())


def test_the_job_reads_absolute_paths_and_prints_tables(
    queue: Queue, asked: EvalOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(asked.out)
    monkeypatch.chdir(out.parent)
    relative = options(Path("data"), Path("out"), as_json=True)
    values = submitted(relative)
    assert (values["nodes"], values["ntasks-per-node"], values["gpus-per-node"]) == ("2", "4", "4")
    assert queue.submitted == [out]
    written = read_options(out)
    assert (written.data, written.out, written.as_json) == (str(out.parent / "data"), str(out), False)
    assert f"export OUT={out}\n" in (out / "job.sbatch").read_text()
    assert (out / "env.sh").stat().st_mode & 0o777 == 0o600  # it may hold what a site keeps to itself
    assert (out / "logs").is_dir()


def test_settings_are_the_options_then_the_runs_then_the_sites(
    queue: Queue, asked: EvalOptions, make_run, tmp_path: Path
) -> None:
    profile = tmp_path / "site" / "alignkd" / "site.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("slurm: {partition: site, account: me, gpus_per_node: 3}\n")
    values = submitted(asked, time="1:00:00")
    assert (values["partition"], values["account"], values["time"]) == ("site", "me", "1:00:00")
    assert submitted(asked, partition="other")["partition"] == "other"
    assert "gpus-per-node" not in submitted(asked, cpu=True)
    assert submitted(asked)["gpus-per-node"] == "4"
    assert submitted(asked, gpus=None)["gpus-per-node"] == "3"
    assert submitted(asked, cpu=True, gpus=None)["ntasks-per-node"] == "1"

    run, _ = make_run()
    text = (run / "config.yaml").read_text()
    assert "  partition: null\n" in text
    (run / "config.yaml").write_text(text.replace("  partition: null\n", "  partition: of-the-run\n"))
    (run / "student").symlink_to(tiny.STUDENT)
    for folder in (run, run / "student"):
        model = ModelChoice("run", str(folder))
        values = submitted(options(Path(asked.data), Path(asked.out), models=(model,)))
        assert values["partition"] == "of-the-run"
        assert "gpus-per-node" not in values  # the run has slurm.gpu_option = none


@pytest.mark.parametrize(
    ("jobs", "problems", "given", "error", "message"),
    [
        ([QueuedJob("5", "PENDING", "", None, "x")], (), {}, UserError, "job 5 is pending already"),
        (None, (), {}, AlignkdError, "Slurm does not answer"),
        ([], ("too few nodes", "too long"), {}, UserError, "2 problems\n  - too few nodes\n  - too long"),
        ([], (), {"time": "soon"}, UserError, r"--time soon: not valid; valid: \[days-\]hours"),
        ([], (), {"partition": ""}, UserError, "--partition : not valid"),
    ],
)
def test_nothing_is_written_for_a_job_that_is_refused(
    queue: Queue, asked: EvalOptions, jobs, problems, given, error, message
) -> None:
    queue.jobs, queue.problems = jobs, problems
    with pytest.raises(error, match=message):
        submitted(asked, **given)
    assert not Path(asked.out).exists()
    assert queue.submitted == []


def test_llama_cpp_is_looked_for_only_where_the_ranks_run_in_this_python(
    queue: Queue, asked: EvalOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_limits, "find_spec", lambda _: None)
    for name in ("text.gguf", "mmproj.gguf"):
        (tmp_path / name).write_bytes(b"")
    phone = options(
        Path(asked.data), Path(asked.out), models=(ModelChoice("phone", str(tmp_path)),), precision=None
    )
    with pytest.raises(UserError, match=r"pip install 'alignkd\[gguf\]'"):
        submitted(phone)
    assert queue.submitted == []
    profile = tmp_path / "site" / "alignkd" / "site.yaml"
    profile.parent.mkdir(parents=True)
    for elsewhere in ("python: /other/bin/python", "container: {kind: pyxis, image: x}"):
        profile.write_text(f"slurm: {{{elsewhere}}}\n")
        submitted(phone)


def test_a_container_must_show_all_that_the_evaluation_reads(
    queue: Queue, asked: EvalOptions, tmp_path: Path
) -> None:
    queue.problems = None
    profile = tmp_path / "site" / "alignkd" / "site.yaml"
    profile.parent.mkdir(parents=True)
    container = f"{{kind: pyxis, image: x, mounts: ['{tmp_path}/out,{tmp_path}/data']}}"
    profile.write_text(f"slurm: {{container: {container}}}\n")
    with pytest.raises(UserError) as refused:
        submitted(asked)
    places = re.findall("- (.*) = .*: no mount of the container shows it there", str(refused.value))
    assert places == ["model student", "--image-folder"]
    assert queue.submitted == []


def test_a_machine_without_slurm_says_so(asked: EvalOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_job, "slurm_is_installed", lambda: False)
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        submitted(asked)
    assert not Path(asked.out).exists()
