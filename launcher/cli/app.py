"""The ``alignkd`` command. Heavy libraries are imported by the commands that need them, never at the top."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from alignkd import __version__
from alignkd.config.presets import PRESETS, write_preset
from alignkd.errors import AlignkdError, UserError, raise_if_passing, report_error
from launcher.backends.base import BackendChoice
from launcher.cli.ckpt import ckpt
from launcher.cli.plan import GpuMemory, memory_option, plans
from launcher.cli.runs import runs
from launcher.commands.launch import LaunchRequest
from launcher.commands.launch import launch as launch_run
from launcher.commands.preflight import MemoryCheck
from launcher.run.checkpoints import step_of

# As a user comes to need them.
ORDER = (
    *("init", "plan", "launch", "status", "logs", "stop", "resume", "cancel", "list", "ckpt", "export"),
    *("probe", "sample-data", "drill", "explain"),
)


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil a large vision-language model into a small one (Align-KD).",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"alignkd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(PRESETS)}.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("alignkd.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write a commented configuration to start from."""
    write_preset(preset, out, force)
    print(f"wrote {out}")


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(help="Configuration of the run.")] = Path("alignkd.yaml"),
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; default: 1, or all hosts.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each node, one per GPU; default: 1, or all slots.")
    ] = None,
    backend: Annotated[BackendChoice, typer.Option(help="`auto` takes Slurm where it answers.")] = "auto",
    hostfile: Annotated[
        Path | None, typer.Option(help="Of --backend ssh: one `host slots=N` a line.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run (run.name).")] = None,
    stage: Annotated[str | None, typer.Option(help="Stage of a file that has stages.")] = None,
    stages: Annotated[str | None, typer.Option(help="Stages to run one after the other: a,b.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated."),
    ] = None,
    gpu_memory: GpuMemory = None,
    skip_memory_check: Annotated[
        bool, typer.Option("--skip-memory-check", help="Launch what `alignkd plan` says cannot fit.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the run folder, show it, stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a configuration, write its run folder and run it."""
    request = LaunchRequest(
        config,
        nodes,
        gpus_per_node,
        backend,
        hostfile,
        name,
        stage,
        stages,
        tuple(overrides or ()),
        dry_run,
        MemoryCheck(memory_option(gpu_memory), skip_memory_check),
    )
    result = launch_run(request, Console(stderr=as_json))
    if as_json:
        print(json.dumps(result))
    raise typer.Exit(result["code"])


app.add_typer(ckpt, name="ckpt")
app.add_typer(runs)  # without a name: commands of their own
app.add_typer(plans)


@app.command()
def probe(
    teacher: Annotated[Path, typer.Option(help="Folder of the teacher.")],
    student: Annotated[Path, typer.Option(help="Folder of the student.")],
    data: Annotated[Path, typer.Option(help="LLaVA-style JSON list; its samples are one batch.")],
    template: Annotated[Literal["plain", "v1"], typer.Option(help="Conversation template.")],
    image_folder: Annotated[Path | None, typer.Option(help="Images are relative to it.")] = None,
    image_aspect_ratio: Annotated[
        Literal["pad", "square"], typer.Option(help="Pad to a square first, or crop.")
    ] = "pad",
    adapters: Annotated[Path | None, typer.Option(help="Adapters (safetensors); else random.")] = None,
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16"], typer.Option(help="Of both models.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of random adapters.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what each loss term weighs on a few samples."""
    with redirect_stdout(sys.stderr):  # DeepSpeed greets on stdout, which is for the result
        from alignkd.probe import run_probe

        result = run_probe(
            teacher, student, data, image_folder, template, image_aspect_ratio, adapters, dtype, seed
        ).as_dict()
    if as_json:
        print(json.dumps(result))
        return
    table = Table("term", "value", "count", "gradient norm")
    for column in table.columns[1:]:
        column.justify = "right"
    for term, value in result["terms"].items():
        count, norm = result["counts"].get(term, ""), result["gradient_norms"].get(term)
        table.add_row(term, f"{value:.6g}", str(count), "" if norm is None else f"{norm:.6g}")
    Console().print(table)


@app.command("sample-data")
def sample_data(
    out: Annotated[Path, typer.Option(help="New folder.")],
    samples: Annotated[int, typer.Option(min=16, help="Training samples.")] = 16000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same data.")] = 0,
) -> None:
    """Write the data of a small real task, offline."""
    from rich.progress import Progress

    from alignkd.data.sample_task.write import write_sample_data

    with Progress(disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("images", total=None)
        write_sample_data(
            out, samples, seed, lambda done, total: bar.update(task, completed=done, total=total)
        )
    print(f"wrote {out}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    out: Annotated[Path, typer.Option(help="New folder for the student.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint to take; default: the newest.")] = None,
    file_format: Annotated[
        Literal["safetensors", "bin"], typer.Option("--format", help="Of the weights.")
    ] = "safetensors",
) -> None:
    """Write a run's student in the MobileVLM V2 format."""
    step_of(run, step)  # before torch is imported, which takes long
    with redirect_stdout(sys.stderr):
        from alignkd.checkpoint.export import export_run

        export_run(run, out, step, file_format)
    print(f"wrote {out}")


def main() -> None:
    """Entry point: errors of the user are one message and an exit code, never a traceback."""
    try:
        app()
    except AlignkdError as error:
        sys.exit(report_error(error))
    except OSError as error:
        if error.filename is None:  # not about a file: a mistake of ours
            raise
        sys.exit(report_error(_file_error(error)))


def _file_error(error: OSError) -> AlignkdError:
    """What no command said better: a folder that this user may not look into, a full disk, a dead server."""
    try:
        raise_if_passing(error, error.filename)
    except AlignkdError as passing:
        return passing
    return UserError(f"{error.filename}: {error.strerror}")
