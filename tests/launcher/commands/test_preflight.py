"""Checks before a launch that need no back end."""

from launcher.commands.preflight import space_problems
from launcher.plan.sizes import run_sizes
from tests.launcher.conftest import FIXTURE


def test_missing_disk_space_is_a_problem(make_config, monkeypatch) -> None:
    assert space_problems(make_config()) == []
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    (problem,) = space_problems(make_config())
    assert "4 checkpoints take about" in problem
    scratch = ["model.student=scratch", f"model.student_config={FIXTURE / 'student'}"]
    assert problem == space_problems(make_config(*scratch, f"model.vision_tower={FIXTURE / 'teacher'}"))[0]


def test_the_space_follows_from_the_parameters(make_config, monkeypatch) -> None:
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
