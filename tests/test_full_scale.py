"""The commands and numbers of docs/full_scale.md hold, on folders with the published shapes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from alignkd.models.tower import PUBLISHED_TOWER_CONFIG
from launcher.cli.app import app
from tests import tiny
from tests.models.test_configuration import PUBLISHED, SHAPE_KEYS, SIZES

PAGE = (Path(__file__).parents[1] / "docs" / "full_scale.md").read_text()
SAMPLES = {"pretrain": (1_246_000, 256), "finetune": (2_400_000, 128)}
# In place of the command: its arguments, and the folder in which it would run.
RECORD = 'alignkd() { printf "%s\\x1f" "$PWD" "$@"; printf "\\n"; }\n'


@cache
def commands(first: int, last: int, folder: str) -> list[tuple[Path, list[str]]]:
    """What the page's shell blocks from ``first`` up to ``last`` call, as bash itself reads them."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)[first:last]
    script = "set -eu\n" + RECORD + "\n".join(blocks)
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    called = [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]
    return [(Path(place), arguments) for place, *arguments in called]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models without weights and empty data, as far as a login node reads them."""
    root = tmp_path_factory.mktemp("full-scale")
    vision = ("mm_", "vision_tower", "image_")
    llama = {key: value for key, value in PUBLISHED.items() if not key.startswith(vision)}
    models = {
        "MobileVLM_V2-7B": PUBLISHED | dict(zip(SHAPE_KEYS, SIZES[2][1], strict=True)),
        "MobileLLaMA-1.4B-Chat": llama
        | dict(zip(SHAPE_KEYS, SIZES[0][1], strict=True))
        | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        "clip-vit-large-patch14-336": {"model_type": "clip_vision_model", **PUBLISHED_TOWER_CONFIG},
    }
    for name, config in models.items():
        (root / "checkpoints" / name).mkdir(parents=True)
        (root / "checkpoints" / name / "config.json").write_text(json.dumps(config))
        shutil.copyfile(tiny.STUDENT / "tokenizer.model", root / "checkpoints" / name / "tokenizer.model")
    for path in re.findall(r"`(data/\w+/\S+\.json)`", PAGE):
        (root / path).parent.mkdir(parents=True)
        (root / path).write_text("[]")
    return root


def output_of(place: Path, *arguments: str) -> str:
    before = Path.cwd()
    os.chdir(place)
    try:
        done = CliRunner().invoke(app, list(arguments))
    finally:
        os.chdir(before)
    assert done.exit_code == 0, done.output
    return done.output


def test_every_command_of_the_page_is_one_that_alignkd_takes(folder: Path) -> None:
    group = typer.main.get_command(app)
    found = commands(0, 4, str(folder))
    for _, (name, *arguments) in found:
        command = group.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, list(arguments))  # raises for what it does not take
    names = [name for _, (name, *_) in found]
    assert [names.count(name) for name in ("plan", "launch", "eval", "report")] == [5, 30, 8, 6]


def test_the_plans_of_the_page_are_those_of_the_published_shapes(folder: Path) -> None:
    plans = {}
    for place, (name, *arguments) in commands(1, 2, str(folder)):
        printed = output_of(place, name, *arguments, *(["--json"] if name == "plan" else []))
        if name == "plan":
            plan = json.loads(printed.splitlines()[-1])
            preset = Path(arguments[0]).stem
            stage = arguments[arguments.index("--stage") + 1]
            is_alone = "distillation.enabled=false" in arguments
            plans[preset, stage, is_alone] = plan
            assert plan["memory"]["fits"]
    assert len(plans) == 5
    rows = re.findall(
        r"^\| (short|long) \| (\w+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.M
    )
    assert len(rows) == 4
    for preset, stage, steps, memory, distilled, _ in rows:
        samples, batch = SAMPLES[stage]
        assert int(steps.replace(",", "")) == -(-samples // batch)
        plan = plans[preset, stage, False]
        assert float(memory) == pytest.approx(plan["memory"]["needed"] / 2**30, abs=0.006)
        assert float(distilled) == pytest.approx(plan["roofline"]["step_seconds"], abs=0.006)
    alone = plans["long", "finetune", True]["roofline"]["step_seconds"]
    assert float(rows[3][5]) == pytest.approx(alone, abs=0.006)
    for preset, stage, *_, printed_alone in rows[:3]:
        plan = plan_with(folder, preset, stage, "distillation.enabled=false", "model.adapters=null")
        assert float(printed_alone) == pytest.approx(plan["roofline"]["step_seconds"], abs=0.006)


def test_the_settings_that_the_page_offers_instead_take_the_memory_it_says(folder: Path) -> None:
    (settings,) = re.findall(r"^`((?:--set \S+ ?)+)` in the `launch`", PAGE, re.M)
    (most,) = re.findall(r"\(41 to (\d+) GiB per GPU", PAGE)
    plan = plan_with(folder, "long", "pretrain", *settings.split()[1::2])
    assert plan["memory"]["fits"]
    assert plan["memory"]["needed"] / 2**30 == pytest.approx(float(most), abs=0.5)


def plan_with(folder: Path, preset: str, stage: str, *settings: str) -> Any:
    """What `alignkd plan` says of a preset's stage. The page's own files may be written before or after."""
    changes = [word for setting in settings for word in ("--set", setting)]
    size = ("--gpus-per-node", "8", "--gpu-memory", "80G")
    output_of(folder, "init", "--preset", preset, "--out", "other.yaml", "--force")
    printed = output_of(folder, "plan", "other.yaml", "--stage", stage, *size, *changes, "--json")
    return json.loads(printed.splitlines()[-1])


def test_hours_follow_from_steps_and_seconds() -> None:
    seconds = {"short": [0.0, 0.0], "long": [0.0, 0.0]}
    for preset, steps, *both in re.findall(
        r"^\| (short|long) \| \w+ \| ([\d,]+) \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.M
    ):
        for number, one in enumerate(both):
            seconds[preset][number] += int(steps.replace(",", "")) * float(one) * 1.35
    rows = re.findall(r"^\| (short|long) \| ([\d.]+) h \| ([\d.]+) h \| (\d+) h \|$", PAGE, re.M)
    assert len(rows) == 2
    for preset, distilled, alone, total in rows:
        hours = [value / 3600 for value in seconds[preset]]
        assert [float(distilled), float(alone)] == pytest.approx(hours, rel=0.03)
        assert int(total) == pytest.approx(3 * (4 * hours[0] + hours[1]), rel=0.03)


@pytest.mark.parametrize("condition", ["short-alone-0", "long-logits-2"])
def test_a_run_of_the_page_may_be_launched(
    folder: Path, condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10**12})  # the machine that runs the tests need not have it
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    called = [entry for entry in commands(2, 3, str(folder)) if entry[0].name == condition]
    for place, arguments in called:
        here = ("--dry-run", "--backend", "local", "--cpu") if arguments[0] == "launch" else ()
        output_of(place, *arguments, *here)
    runs = folder / condition / "runs"
    assert len(list(runs.iterdir())) == 2
    assert f"seed: {condition[-1]}" in next(runs.glob("*-finetune")).joinpath("config.yaml").read_text()
