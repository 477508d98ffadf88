"""The checks that need no Slurm; the others are in tests/slurm."""

from pathlib import Path

import pytest

from launcher.backends.slurm import preflight as slurm_preflight
from launcher.backends.slurm.preflight import minutes, slurm_problems, slurm_warnings
from launcher.run.disk import file_system

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
    (warning,) = slurm_warnings(make_config("slurm.partition=gpu"), 1)
    assert warning == "partition gpu: `scontrol show partition` lists only low, short"
    assert slurm_warnings(make_config("slurm.partition=short"), 1) == []
    monkeypatch.setattr(slurm_preflight, "run_slurm_command", lambda *_: PARTITIONS.replace("=YES", "=NO"))
    assert "no default partition" in slurm_warnings(make_config(), 1)[0]
    assert slurm_problems(make_config(), 1, 1) == []


def test_a_slurm_that_does_not_answer_is_a_problem(make_config, monkeypatch) -> None:
    monkeypatch.setattr(slurm_preflight, "run_slurm_command", lambda *_: None)
    (problem,) = slurm_problems(make_config(), 1, 1)
    assert "Slurm does not answer" in problem


def test_a_local_file_system_gives_a_warning_for_several_nodes(make_config, monkeypatch) -> None:
    assert file_system(Path("/proc/self")) == "proc"
    monkeypatch.setattr(slurm_preflight, "run_slurm_command", lambda *_: PARTITIONS)
    monkeypatch.setattr(slurm_preflight, "file_system", lambda _: "ext4")
    assert slurm_warnings(make_config(), 1) == []
    assert "shared file system" in slurm_warnings(make_config(), 2)[0]
    monkeypatch.setattr(slurm_preflight, "file_system", lambda _: "nfs4")
    assert slurm_warnings(make_config(), 2) == []
