"""``alignkd plan``: what a run will need, before anything queues."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from alignkd.config import Config, load_config
from alignkd.config.yaml_reader import read_yaml
from alignkd.errors import ConfigError, UserError
from launcher.plan.advice import advise, changes
from launcher.plan.apply import apply_changes
from launcher.plan.as_dict import plan_as_dict
from launcher.plan.check import configured_memory, memory_bytes
from launcher.plan.compute import H100_BF16_DENSE, Speed
from launcher.plan.plan import make_plan
from launcher.plan.show import show_plan
from launcher.plan.sizes import run_sizes
from launcher.plan.upstream_stages import coming_notes
from launcher.plan.workload import Cluster
from launcher.run.site import read_site

plans = typer.Typer(rich_markup_mode=None)
GpuMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory of one GPU, 80G say; default: slurm.gpu_memory.")
]


@plans.command()
def plan(
    config: Annotated[Path, typer.Argument(help="Configuration of the run.")] = Path("alignkd.yaml"),
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 1,
    gpu_memory: GpuMemory = None,
    flops: Annotated[
        float,
        typer.Option(
            min=1,
            show_default=False,
            help="FLOP/s of one GPU at its best; default: 989e12, an H100's in bf16.",
        ),
    ] = H100_BF16_DENSE,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="The share of them that training reaches.")
    ] = 0.4,
    stage: Annotated[str | None, typer.Option(help="Stage of a file that has stages.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated."),
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the advice, and what --set gives, into the file.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a run needs, and what would fit best.

    That is memory, traffic between GPUs and nodes, and work.
    """
    if not math.isfinite(flops):
        raise UserError(f"--flops {flops}: not a speed; valid: a number such as 989e12")
    resolved = load_config(config, overrides or (), stage, read_site())
    memory = memory_option(gpu_memory) or configured_memory(resolved)
    if apply and memory is None:
        raise UserError("--apply needs the memory of a GPU: --gpu-memory 80G, or the key slurm.gpu_memory")
    others = _other_stages(config, stage)
    planned = make_plan(resolved, Cluster(nodes, gpus_per_node), run_sizes(resolved, others))
    advised = None if memory is None else advise(planned, memory)
    speed, say = Speed(flops, utilisation), Console(stderr=as_json)
    for note in coming_notes(resolved, others):
        say.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(plan_as_dict(planned, memory, advised, speed)))
    else:
        show_plan(planned, memory, advised, speed, Console())
    if not apply:
        return
    if advised is None:
        raise UserError(f"{config}: nothing fits, so nothing was written")
    values = _given(resolved, overrides or ()) | changes(planned, advised)
    for line in apply_changes(config, stage, values):
        say.print(line, markup=False, highlight=False, soft_wrap=True)


def _given(config: Config, overrides: Sequence[str]) -> dict[str, Any]:
    """What ``--set`` gives, by key, as it was understood: the advice holds together with it only."""
    document, found = config.model_dump(), {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        value: Any = document
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        found[key] = value
    return found


def _other_stages(path: Path, stage: str | None) -> list[Config]:
    """The file's other stages, which may make what this one starts from; those with problems are left out."""
    found = []
    names = (read_yaml(path).get("stages") or {}) if stage is not None else {}
    for name in names:
        with suppress(ConfigError):
            found += [load_config(path, (), name)] if name != stage else []
    return found


def memory_option(text: str | None) -> int | None:
    """Bytes of ``--gpu-memory``. Raises UserError."""
    size = None if text is None else memory_bytes(text)
    if size == 0:
        raise UserError(f"--gpu-memory {text}: not a size of memory; valid: a number and M, G or T (80G)")
    return size
