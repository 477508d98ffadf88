"""Commands on models and data: export, probe, sample-data."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from alignkd.errors import UserError
from launcher.cli.framework import Commands
from launcher.cli.options import Checkpoint, Json, chosen_step, make_console, stdout_is_stderr

models = Commands()


@models.command()
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder; with --format gguf also a MobileVLM folder.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the student.")],
    step: Checkpoint = None,
    file_format: Annotated[
        Literal["safetensors", "bin", "gguf", "lora"],
        typer.Option(
            "--format",
            metavar="NAME",
            help="Weights as safetensors, bin, or gguf for llama.cpp; lora: the adapters alone.",
        ),
    ] = "safetensors",
    quantize: Annotated[
        Literal["f16", "q8_0", "q4_0"] | None,
        typer.Option(metavar="TYPE", help="GGUF weights: f16, q8_0 or q4_0.", show_default="q8_0"),
    ] = None,
    class_token: Annotated[
        bool | None,
        typer.Option(
            "--class-token/--no-class-token",
            help="GGUF: keep the vision tower's class token.",
            show_default="no-class-token",
        ),
    ] = None,
) -> None:
    """Write a run's student: model folder, GGUF or LoRA adapters."""
    if file_format != "gguf" and (quantize is not None or class_token is not None):
        raise UserError("--quantize and --[no-]class-token need --format gguf")
    from launcher.run.checkpoints import step_of

    is_model = file_format == "gguf" and (run / "config.json").is_file()
    if is_model and step is not None:
        raise UserError(f"--step {step}: {run} is a model folder, which has no checkpoints")
    number = None if is_model else chosen_step(run, step)
    if not is_model:
        step_of(run, number)  # before torch is imported, which takes seconds
    with stdout_is_stderr():
        if file_format == "gguf":
            if importlib.util.find_spec("gguf") is None:
                raise UserError("--format gguf needs the package gguf: pip install gguf")
            from alignkd.export.gguf import export_gguf, export_run_as_gguf

            kept = class_token is True
            if is_model:
                export_gguf(run, out, run.resolve().name, quantize or "q8_0", class_token=kept)
            else:
                export_run_as_gguf(run, out, number, quantize or "q8_0", class_token=kept)
        elif file_format == "lora":
            from alignkd.checkpoint.export import export_lora

            export_lora(run, out, number)
        else:
            from alignkd.checkpoint.export import export_run

            export_run(run, out, number, file_format)
    print(f"wrote {out}")


@models.command()
def probe(
    run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run folder: models, data and settings are the run's own."),
    ] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Samples of the run, with --run; an epoch at most.")
    ] = 8,
    teacher: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model folder of the teacher, without --run.")
    ] = None,
    student: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Model folder of the student, without --run.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="LLaVA-style JSON list, read as one batch.")
    ] = None,
    template: Annotated[
        Literal["plain", "v1", "chat"] | None,
        typer.Option(
            metavar="NAME", help="Conversation template: plain or v1 (MobileVLM), chat (other families)."
        ),
    ] = None,
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that image paths are relative to.")
    ] = None,
    image_aspect_ratio: Annotated[
        Literal["pad", "square"] | None,
        typer.Option(
            metavar="MODE", help="How images become squares: pad or square (crop).", show_default="pad"
        ),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Adapters (safetensors).", show_default="random")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16"] | None,
        typer.Option(
            metavar="TYPE", help="float32, float64 or bfloat16, for both models.", show_default="float32"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of random adapters.", show_default="0")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show each loss and its gradient norm on a few samples."""
    own = (teacher, student, data, template, image_folder, image_aspect_ratio, adapters, dtype, seed)
    if run is not None and own != (None,) * len(own):
        raise UserError("--run brings its own models, data and settings; valid beside it: --samples, --json")
    if run is not None:
        with stdout_is_stderr():
            from alignkd.probe import run_probe_of_run

            result = run_probe_of_run(run, samples).as_dict()
    elif teacher is None or student is None or data is None or template is None:
        raise UserError("give either --run, or all of --teacher, --student, --data and --template")
    else:
        with stdout_is_stderr():
            from alignkd.probe import run_probe

            result = run_probe(
                teacher,
                student,
                data,
                image_folder,
                template,
                image_aspect_ratio or "pad",
                adapters,
                dtype or "float32",
                seed or 0,
            ).as_dict()
    if as_json:
        print(json.dumps(result))
        return
    from launcher.cli.tables import probe_parts_table, probe_table

    console = make_console()
    console.print(probe_table(result))
    console.print(probe_parts_table(result))


@models.command("sample-data")
def sample_data(
    out: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the data.")],
    samples: Annotated[int, typer.Option(metavar="N", min=16, help="Number of training samples.")] = 16000,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed; equal seeds give equal data.")] = 0,
) -> None:
    """Write the data of a small but real task, offline."""
    from rich.progress import Progress

    from alignkd.data.sample_task.write import write_sample_data

    with Progress(disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("images", total=None)
        write_sample_data(
            out, samples, seed, lambda done, total: bar.update(task, completed=done, total=total)
        )
    print(f"wrote {out}")
