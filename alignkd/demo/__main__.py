"""``python -m alignkd.demo``: distils a student from scratch with the commands that a user would type.

A part whose result exists is skipped, and an interrupted run resumes from its checkpoint, so the demo can be
stopped and restarted at any time. Delete its folder to start over.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.rule import Rule

from alignkd.demo.report import TrainedModel, print_agreement, print_report
from alignkd.errors import AlignkdError, TrainingError, report_error
from alignkd.evaluate.scoring import score_file
from alignkd.evaluate.tasks import sample
from alignkd.run_folder.paths import RunPaths

SAMPLES, VLM_SAMPLES, PHONE_SAMPLES = 16000, 8000, 3000
SEED = 0
NODES = 2

# Stages of the second form, by the model folder that they begin from.
VLM_STAGES = {
    "teacher": {"teacher": "trained from scratch, with its vision tower"},
    "student": {
        "alone": "the same student, data and steps without the teacher",
        "student": "distilled from the teacher",
    },
}

PHONE_STAGES = {
    "teacher": "teacher: trained from scratch, on top of a trained vision tower",
    "student": "student: distilled from the teacher",
}
QUANTIZED = ("f16", "q8_0")

CONSOLE = Console(color_system=None if os.environ.get("NO_COLOR") else "auto")


@dataclass(frozen=True)
class Part:
    """One command, and the file that exists once it is done."""

    title: str
    command: list[str]
    result: Path


def run_demo(out: Path, *, baseline: bool) -> None:
    """Run all parts in ``out``, then print the tables. ``baseline`` adds the same student without a
    teacher."""
    out.mkdir(parents=True, exist_ok=True)
    configuration, data = out / "alignkd.yaml", out / "sample"
    _run(
        Part(
            "configuration",
            ["alignkd", "init", "--preset", "sample", "--out", str(configuration)],
            configuration,
        )
    )
    _run(_sample_data(data, SAMPLES))
    titles = {
        "teacher": "teacher: trained from scratch, with its vision tower",
        "student": "student: distilled from the teacher",
    }
    if baseline:
        titles["baseline"] = "baseline: the same student without the teacher"
    models = []
    for stage, title in titles.items():
        _train(title, configuration, stage, out / "runs" / stage)
        models.append(_evaluate(stage, out / "runs" / stage, data))
    print_report(models, CONSOLE)


def run_vlm_demo(out: Path) -> None:
    """The same for a tiny SmolVLM, whose student begins with the trained teacher's vision tower: alone, and
    distilled in as many steps."""
    out.mkdir(parents=True, exist_ok=True)
    configuration, data = out / "alignkd.yaml", out / "sample"
    _run(_sample_data(data, VLM_SAMPLES))
    models = []
    for folder, title in {
        "teacher": "configuration, and a tiny SmolVLM of random weights",
        "student": "a smaller one with the teacher's vision tower",
    }.items():
        command = [sys.executable, "-m", "alignkd.demo.vlm_pair", folder, "--out", str(out)]
        _run(Part(title, command, out / "models" / folder / "config.json"))
        for stage, what in VLM_STAGES[folder].items():
            _train(f"{stage}: {what}", configuration, stage, out / "runs" / stage)
            models.append(_evaluate(stage, out / "runs" / stage, data))
    print_report(models, CONSOLE)


def run_phone_demo(out: Path) -> None:
    """A pair whose student llama.cpp runs: distilled, exported, and compared with its exports."""
    out.mkdir(parents=True, exist_ok=True)
    configuration, data = out / "alignkd.yaml", out / "sample"
    _run(_sample_data(data, PHONE_SAMPLES))
    command = [sys.executable, "-m", "alignkd.demo.phone_models", "--out", str(out)]
    title = "configuration, the shapes of both models, and a tower of 24 x 24 patches that learns to see"
    _run(Part(title, command, out / "models" / "tower" / "config.json"))
    folders = {}
    for stage, title in PHONE_STAGES.items():
        _train(title, configuration, stage, out / "runs" / stage)
        folders[stage] = RunPaths(out / "runs" / stage).student
    for quantize in QUANTIZED:
        folders[quantize] = out / f"phone-{quantize}"
        command = ["alignkd", "export", str(out / "runs" / "student"), "--format", "gguf"]
        command += ["--quantize", quantize, "--out", str(folders[quantize])]
        _run(Part(f"student for llama.cpp, in {quantize}", command, folders[quantize] / "text.gguf"))
    answers = {name: out / "eval" / name / f"{sample.TASK.name}.jsonl" for name in folders}
    command = ["alignkd", "eval", *(f"{name}={folder}" for name, folder in folders.items())]
    command += ["--task", sample.TASK.name, "--data", str(data), "--out", str(out / "eval")]
    command += ["--device", "cpu"]
    title = f"answers to the test questions; llama.cpp's for {' and '.join(QUANTIZED)}"
    _run(Part(title, command, answers[QUANTIZED[-1]]))
    scores = {name: score_file(sample.TASK, file, data) for name, file in answers.items()}
    trained = [TrainedModel.of_run(stage, out / "runs" / stage, scores[stage]) for stage in PHONE_STAGES]
    print_report(trained, CONSOLE, {name: scores[name] for name in QUANTIZED})
    for name in QUANTIZED:
        print_agreement(name, answers["student"], answers[name], CONSOLE)


def _sample_data(data: Path, samples: int) -> Part:
    command = ["alignkd", "sample-data", "--out", str(data), "--samples", str(samples), "--seed", str(SEED)]
    return Part("data: real handwritten digits, and questions about them", command, data / "test.json")


def _train(title: str, configuration: Path, stage: str, run: Path) -> None:
    if run.exists():
        command = ["alignkd", "resume", str(run)]
    else:
        command = ["alignkd", "launch", str(configuration), "--stage", stage]
        command += ["--nodes", str(NODES), "--backend", "local", "--cpu"]
    _run(Part(title, command, RunPaths(run).student / "config.json"))


def _evaluate(stage: str, run: Path, data: Path) -> TrainedModel:
    """Let the model answer the test questions, and score its answers."""
    out = run.parent.parent / "eval"
    answers = out / stage / f"{sample.TASK.name}.jsonl"
    command = ["alignkd", "eval", str(RunPaths(run).student), "--task", sample.TASK.name]
    command += ["--data", str(data), "--out", str(out), "--device", "cpu"]
    _run(Part(f"{stage}: answers to the test questions", command, answers))
    return TrainedModel.of_run(stage, run, score_file(sample.TASK, answers, data))


def _run(part: Part) -> None:
    CONSOLE.print(Rule(part.title, align="left"))
    if part.result.exists():
        CONSOLE.print(f"already done: {part.result}", style="dim", markup=False, soft_wrap=True)
        return
    CONSOLE.print(f"$ {_as_typed(part.command)}", style="bold", markup=False, soft_wrap=True)
    started = time.monotonic()
    finished = subprocess.run(_executable(part.command), check=False)
    if finished.returncode != 0:
        raise TrainingError(f"{part.title}: the command above failed with exit code {finished.returncode}")
    CONSOLE.print(f"{time.monotonic() - started:.0f} s", style="dim")


def _executable(command: Sequence[str]) -> list[str]:
    """``alignkd`` of this environment, even if it is not activated."""
    if command[0] == "alignkd":
        return [str(Path(sys.executable).parent / "alignkd"), *command[1:]]
    return list(command)


def _as_typed(command: Sequence[str]) -> str:
    first = "python" if command[0] == sys.executable else command[0]
    return shlex.join([first, *command[1:]])


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for all files of the demo.")] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also train the same student without a teacher.")
    ] = False,
    vlm: Annotated[bool, typer.Option("--vlm", help="Distil a tiny SmolVLM instead of a MobileVLM.")] = False,
    phone: Annotated[
        bool, typer.Option("--phone", help="Distil a student for llama.cpp, export it as GGUF and ask that.")
    ] = False,
) -> None:
    """Train a tiny teacher, distil it into a student, and compare them."""
    try:
        if vlm:
            run_vlm_demo(out or Path("demo-vlm"))
        elif phone:
            run_phone_demo(out or Path("demo-phone"))
        else:
            run_demo(out or Path("demo"), baseline=baseline)
    except AlignkdError as error:
        raise typer.Exit(report_error(error)) from None
    except KeyboardInterrupt:
        CONSOLE.print("stopped; run the same command again to resume")
        raise typer.Exit(130) from None


if __name__ == "__main__":
    typer.run(main)
