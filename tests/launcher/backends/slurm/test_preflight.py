"""The parts of the checks that need no Slurm; the others are in tests/slurm."""

from pathlib import Path

import pytest

from launcher.backends.slurm import preflight as slurm_preflight
from launcher.backends.slurm.preflight import (
    file_system,
    minutes,
    slurm_problems,
    slurm_warnings,
    space_problems,
)
from launcher.plan.sizes import run_sizes
from tests.launcher.conftest import FIXTURE

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
def test_minutes(limit: str, expected: float | None) -> None:
    assert minutes(limit) == expected


@pytest.fixture
def partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_preflight, "ask", lambda *_: PARTITIONS)
    monkeypatch.setattr(slurm_preflight, "_test_only", lambda _: [])


@pytest.mark.usefixtures("partitions")
@pytest.mark.parametrize(
    ("settings", "nodes", "message"),
    [
        ("{}", 4, None),
        ("{}", 5, "has 4 nodes"),
        ("{partition: 'short,low'}", 4, None),
        ("{partition: short}", 3, "has 2 nodes"),
        ("{partition: gpu}", 1, "no such partition; valid: low, short"),
        ("{partition: short, time_limit: '24:00:00'}", 1, None),
        ("{partition: short, time_limit: '24:00:01'}", 1, "gives at most 1440 minutes"),
        ("{partition: 'short,low', time_limit: '99:00:00'}", 1, None),
        ("{time_limit: '6', signal_seconds: 300}", 1, "told to save at once"),
        ("{time_limit: '7', signal_seconds: 300}", 1, None),
        ("{container: {kind: pyxis}}", 1, "needs slurm.container.image"),
    ],
)
def test_partitions_and_limits(make_config, settings: str, nodes: int, message: str | None) -> None:
    problems = slurm_problems(make_config(f"slurm={settings}"), nodes, 1)
    if message is None:
        assert problems == []
    else:
        (problem,) = problems
        assert message in problem


def test_no_answer(make_config, monkeypatch) -> None:
    monkeypatch.setattr(slurm_preflight, "ask", lambda *_: None)
    (problem,) = slurm_problems(make_config(), 1, 1)
    assert "Slurm does not answer" in problem


def test_space(make_config, monkeypatch) -> None:
    assert space_problems(make_config()) == []
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    (problem,) = space_problems(make_config())
    assert "4 checkpoints take about" in problem
    scratch = ["model.student=scratch", f"model.student_config={FIXTURE / 'student'}"]
    assert problem == space_problems(make_config(*scratch, f"model.vision_tower={FIXTURE / 'teacher'}"))[0]


def test_the_space_is_counted_from_the_parameters(make_config, monkeypatch) -> None:
    """fp32: 4 + 12 bytes of each trained number, 4 of each frozen one."""
    asked = []

    def usage(_place):
        return type("Usage", (), {"free": asked[-1]})

    monkeypatch.setattr("shutil.disk_usage", usage)
    sizes = run_sizes(make_config())
    trained, frozen = sum(sizes.trainable(make_config()).values()), sum(sizes.frozen(make_config()).values())
    need = 4 * (16 * trained + 4 * frozen)
    asked.append(need)
    assert space_problems(make_config()) == []
    asked.append(need - 1)
    assert len(space_problems(make_config())) == 1


def test_a_local_file_system_is_mentioned(make_config, monkeypatch) -> None:
    assert file_system(Path("/proc/self")) == "proc"
    monkeypatch.setattr(slurm_preflight, "file_system", lambda _: "ext4")
    assert slurm_warnings(make_config(), 1) == []
    assert "shared file system" in slurm_warnings(make_config(), 2)[0]
    monkeypatch.setattr(slurm_preflight, "file_system", lambda _: "nfs4")
    assert slurm_warnings(make_config(), 2) == []
