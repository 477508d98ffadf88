"""Commands that let models answer: eval, chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from alignkd.errors import UserError
from launcher.cli.framework import Commands
from launcher.cli.options import (
    Checkpoint,
    JobNodes,
    JobPartition,
    JobRanks,
    JobTime,
    Json,
    chosen_step,
    make_console,
    refuse_job_options,
    stdout_is_stderr,
)

evaluations = Commands()


@evaluations.command("eval")
def evaluate(
    tasks: Annotated[
        str,
        typer.Option(
            "--task",
            "--tasks",
            metavar="NAME,...",
            help="Benchmarks: gqa, sqa, textvqa, pope, mme, mmbench, or all; sample for the digits of "
            "sample-data; own for your own questions.",
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the benchmarks' published files.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Models to evaluate: model folders, GGUF exports or run folders; NAME=FOLDER gives one a "
            "name.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for answers and scores.")] = Path("eval"),
    score: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Score these answers (JSONL); given twice, compare the two."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check that all files and images are there.")
    ] = False,
    step: Checkpoint = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Processes here that share the questions, one per GPU.",
            show_default="1",
        ),
    ] = None,
    nodes: JobNodes = None,
    gpus_per_node: JobRanks = None,
    partition: JobPartition = None,
    time_limit: JobTime = None,
    device: Annotated[
        Literal["auto", "cpu"], typer.Option(metavar="NAME", help="auto (GPUs if there are any) or cpu.")
    ] = "auto",
    precision: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(metavar="NAME", help="bf16, fp16 or fp32.", show_default="bf16 on GPUs, fp32 on CPUs"),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Questions answered together.")] = 16,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ask only the first N questions of each task.")
    ] = None,
    image_padding: Annotated[
        Literal["pad", "crop"] | None,
        typer.Option(
            metavar="MODE",
            help="Pad images to a square, or crop their centre.",
            show_default="crop for sqa, else as the model was trained",
        ),
    ] = None,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Question file of task own, below the data folder.")
    ] = None,
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Images of task own.", show_default="beside FILE")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Metric of task own: exact, vqa, letter, yes-no.", show_default="exact"
        ),
    ] = None,
    by_category: Annotated[
        bool, typer.Option("--by-category", help="Print a table per category of each task.")
    ] = False,
    upload: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write MMBench's upload file (.tsv, .xlsx) as well.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate models, or score answers, on the public benchmarks."""
    from alignkd.evaluate.options import EvalOptions, OwnQuestions, chosen_tasks, named_models

    if sum(map(bool, (models, check, score))) != 1:
        raise UserError("give either models, --check or --score FILE")
    if questions is None and (metric is not None or image_folder is not None):
        raise UserError("--metric and --image-folder are only for --task own")
    refuse_job_options(nodes, gpus_per_node, partition, time_limit)
    if nodes is not None and (not models or ranks is not None):
        raise UserError("--nodes N is for models, and has --gpus-per-node instead of --ranks")
    unused = {"--step": step, "--precision": precision, "--limit": limit, "--image-padding": image_padding}
    given = [name for name, value in unused.items() if value is not None]
    if not models and given:
        raise UserError(f"{', '.join(given)}: only for answers of a model; valid: eval MODEL ...")
    if upload is not None and not score:
        raise UserError("--upload needs --score FILE")
    images = None if image_folder is None else str(image_folder)
    own = None if questions is None else OwnQuestions(questions, images, metric or "exact")
    if not models:
        from launcher.commands.score import show_check, show_scores

        chosen = chosen_tasks(tasks, data, own)
        if check:
            show_check(chosen, data, as_json=as_json)
        else:
            show_scores(chosen, score or [], data, upload, make_console(), as_json=as_json)
        return
    options = EvalOptions(
        named_models(models),
        tasks,
        str(data),
        str(out),
        own,
        _step_of_models(models, step),
        precision,
        batch_size,
        limit,
        image_padding,
        as_json,
        by_category,
    )
    if nodes is not None:
        from launcher.commands.evaluate_job import JobSize, submit_evaluation

        size = JobSize(nodes, gpus_per_node)
        job = submit_evaluation(options, size, partition, time_limit, cpu=device == "cpu")
        _show_job(out.absolute(), job, as_json)
        return
    from launcher.commands.evaluate import run_evaluation

    raise typer.Exit(run_evaluation(options, ranks or 1, device))


def _step_of_models(models: list[str], step: str | None) -> int | None:
    """Raises UserError for the best steps of several runs, which may differ."""
    from alignkd.evaluate.options import named_models

    if step == "best" and len(models) > 1:
        raise UserError("--step best is for one run; valid: one model, or the step as a number")
    return chosen_step(Path(named_models(models)[0].folder), step)


def _show_job(out: Path, job: str, as_json: bool) -> None:
    scores, log = out / "scores.json", out / "logs" / f"slurm-{job}.log"
    if as_json:
        print(json.dumps({"job": job, "out": str(out), "scores": str(scores), "log": str(log)}))
        return
    print(f"submitted job {job}; log: {log}")
    print(f"answers come to {out}, scores to {scores}, tables to {out / 'logs' / 'rank-0.log'}")
    print("after a time limit or a failure, the same command resumes")


@evaluations.command()
def chat(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder, GGUF export or run folder.")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.")],
    step: Checkpoint = None,
    precision: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(metavar="NAME", help="bf16, fp16 or fp32.", show_default="bf16 on GPUs, fp32 on CPUs"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.0, help="Of sampling; 0 takes the most likely token.")
    ] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer.")] = 256,
) -> None:
    """Ask a model about an image, line by line.

    Ctrl-D ends; an empty line starts a new conversation.
    """
    from alignkd.evaluate.model_folders import folder_kind
    from alignkd.evaluate.tasks.pictures import PictureFile, require_picture

    number = chosen_step(model, step)
    folder_kind(model, number)  # before torch is imported, which takes seconds
    require_picture(PictureFile(image.parent, image.name))
    try:
        with stdout_is_stderr():
            from alignkd.evaluate.chat import chat as start
            from alignkd.evaluate.generation import Decoding
            from alignkd.evaluate.model import load

            loaded = load(model, step=number, precision=precision)
        start(loaded, image, Decoding(max_new_tokens, temperature))
    except KeyboardInterrupt:
        print()
        raise typer.Exit(130) from None
