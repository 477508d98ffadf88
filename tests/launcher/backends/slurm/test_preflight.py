"""The checks that need no Slurm; the others are in tests/slurm."""

from pathlib import Path

import pytest

from launcher.backends.slurm import preflight as slurm_preflight
from launcher.backends.slurm.preflight import minutes, slurm_problems, slurm_warnings
from launcher.run.disk import file_system

ALONE = "data.workers=0"  # a rank that shares its core with nobody
PARTITIONS = (
    "PartitionName=low Default=YES MaxTime=UNLIMITED State=UP TotalNodes=4\n"
    "PartitionName=short Default=NO MaxTime=1-00:00:00 State=UP TotalNodes=2\n"
)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("30", 30),
        ("30:30", 30.5),
        ("2:00:00", 120),
        ("1-0", 1440),
        ("1-2:30", 1590),
        ("1-2:30:30", 1590.5),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_every_form_of_a_time_limit_is_read(limit: str, expected: float | None) -> None:
    assert minutes(limit) == expected


@pytest.fixture
def partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_preflight, "run_slurm_command", lambda *_: PARTITIONS)
    monkeypatch.setattr(slurm_preflight, "_test_only", lambda _: [])


@pytest.mark.usefixtures("partitions")
@pytest.mark.parametrize(
    ("settings", "nodes", "message"),
    [
        ("{}", 4, None),
        ("{}", 5, "has 4 nodes"),
        ("{partition: 'short,low'}", 4, None),
        ("{partition: short}", 3, "has 2 nodes"),
        ("{partition: gpu}", 99, None),  # may be hidden: sbatch --test-only knows
        ("{partition: short, sbatch_options: {partition: low}}", 4, None),
        ("{sbatch_options: {partition: short}}", 3, "has 2 nodes"),
        ("{partition: short, time_limit: '24:00:00'}", 1, None),
        ("{partition: short, time_limit: '24:00:01'}", 1, "allows at most 1440 minutes"),
        ("{partition: 'short,low', time_limit: '99:00:00'}", 1, None),
        ("{time_limit: '6', signal_seconds: 300}", 1, "told to save as soon as they start"),
        ("{time_limit: '7', signal_seconds: 300}", 1, None),
        ("{container: {kind: pyxis}}", 1, "needs slurm.container.image"),
    ],
)
def test_a_job_must_fit_its_partition(make_config, settings: str, nodes: int, message: str | None) -> None:
    problems = slurm_problems(make_config(f"slurm={settings}"), nodes, 1)
    if message is None:
        assert problems == []
    else:
        (problem,) = problems
        assert message in problem


@pytest.mark.usefixtures("partitions")
def test_the_partition_of_the_login_shell_counts_where_none_is_set(make_config, monkeypatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "short")
    (problem,) = slurm_problems(make_config(), 3, 1)
    assert "has 2 nodes" in problem
    assert slurm_problems(make_config("slurm.partition=low"), 3, 1) == []


@pytest.mark.usefixtures("partitions")
def test_a_partition_that_is_not_shown_gives_a_warning(make_config, monkeypatch) -> None:
    (warning,) = slurm_warnings(make_config("slurm.partition=gpu", ALONE), 1)
    assert warning == "partition gpu: `scontrol show partition` lists only low, short"
    assert slurm_warnings(make_config("slurm.partition=short", ALONE), 1) == []
    monkeypatch.setattr(slurm_preflight, "run_slurm_command", lambda *_: PARTITIONS.replace("=YES", "=NO"))
    assert "no default partition" in slurm_warnings(make_config(ALONE), 1)[0]
    assert slurm_problems(make_config(), 1, 1) == []


def test_a_slurm_that_does_not_answer_is_a_problem(make_config, monkeypatch) -> None:
    monkeypatch.setattr(slurm_preflight, "run_slurm_command", lambda *_: None)
    (problem,) = slurm_problems(make_config(), 1, 1)
    assert "Slurm does not answer" in problem


def test_a_local_file_system_gives_a_warning_for_several_nodes(make_config, monkeypatch) -> None:
    assert file_system(Path("/proc/self")) == "proc"
    monkeypatch.setattr(slurm_preflight, "run_slurm_command", lambda *_: PARTITIONS)
    monkeypatch.setattr(slurm_preflight, "file_system", lambda _: "ext4")
    assert slurm_warnings(make_config(ALONE), 1) == []
    assert "shared file system" in slurm_warnings(make_config(ALONE), 2)[0]
    monkeypatch.setattr(slurm_preflight, "file_system", lambda _: "nfs4")
    assert slurm_warnings(make_config(ALONE), 2) == []


@pytest.mark.usefixtures("partitions")
@pytest.mark.parametrize(
    ("settings", "workers", "warns"),
    [
        ("{}", 2, True),  # Slurm gives a task one core
        ("{}", 0, False),
        ("{cpus_per_task: 1}", 2, True),
        ("{cpus_per_task: 1, exclusive: true}", 2, True),
        ("{cpus_per_task: 2}", 2, False),
        ("{exclusive: true}", 2, False),
        ("{sbatch_options: {cpus-per-gpu: 8}}", 2, False),
        ("{partition: many}", 2, False),  # gives each GPU eight cores
    ],
)
def test_a_rank_that_shares_one_core_with_its_loader_gives_a_warning(
    make_config, monkeypatch, settings: str, workers: int, warns: bool
) -> None:
    many = "PartitionName=many Default=NO State=UP TotalNodes=4 JobDefaults=DefCpuPerGPU=8\n"
    monkeypatch.setattr(slurm_preflight, "run_slurm_command", lambda *_: PARTITIONS + many)
    warnings = slurm_warnings(make_config(f"slurm={settings}", f"data.workers={workers}"), 1)
    assert [("shares with 2 loader processes (data.workers); better: 3" in text) for text in warnings] == [
        True
    ] * warns


@pytest.mark.usefixtures("partitions")
def test_a_container_must_show_what_the_ranks_read_and_write(make_config, tmp_path: Path) -> None:
    runs, fixture = tmp_path / "runs", make_config().model.student.rpartition("/")[0]

    def found(*mounts: str) -> list[str]:
        container = f"{{kind: pyxis, image: x, mounts: [{', '.join(mounts)}]}}"
        problems = slurm_problems(make_config(f"slurm.container={container}"), 1, 1)
        return [text.partition(" = ")[0] for text in problems]

    everything = ["run.folder", "model.teacher", "model.student", "data.sources[0].file"]
    assert found() == everything
    assert found(f"{fixture}:{fixture}") == ["run.folder", "data.sources[0].file"]
    assert found(f"{fixture}:{fixture}", f"{tmp_path}:{tmp_path}") == []
    (runs / "run").mkdir(parents=True)
    (runs / "run" / "checkpoints").symlink_to("/elsewhere")
    assert found(f"{fixture}:{fixture}", f"{tmp_path}:{tmp_path}") == ["checkpoints"]
