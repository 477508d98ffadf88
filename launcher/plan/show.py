"""A plan on a terminal of 80 columns."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from alignkd.text import counted
from launcher.plan.advice import PLACEMENTS, changes, largest_micro_batch, with_placement
from launcher.plan.cached import cache_lines
from launcher.plan.measurements import measurement_line
from launcher.plan.memory import PHASES
from launcher.plan.plan import GIB, Plan
from launcher.plan.roofline import Chip, roofline
from launcher.plan.trained import trained_parts
from launcher.plan.weights import weight_notes
from launcher.plan.workload import IMAGES_PER_SAMPLE

LARGEST_COSTS = 3
PARTS = (
    ("tower", "vision_tower."),
    ("proj.", "projector."),
    ("layers", "language_model.layers."),
    ("embed.", "language_model.embed_tokens."),
    ("head", "head."),
)


def show_plan(plan: Plan, gpu_memory: int | None, advised: Plan | None, chip: Chip, console: Console) -> None:
    _say_workload(plan, console)
    _show_table(_parameter_table(plan), console)
    for note in weight_notes(plan.config, plan.sizes):
        _say(console, f"warning: {note}")
    _show_table(_memory_table(plan), console)
    _say_fit(plan, gpu_memory, console)
    if plan.traffic:
        _show_table(_traffic_table(plan), console)
    if plan.through_host:
        _say(console, f"Between each GPU and host memory: about {_gb(plan.through_host)} GB per step.\n")
    if plan.sizes.teacher is not None:
        _show_table(_placement_table(plan, gpu_memory), console)
    _say_speed(plan, chip, console)
    if (line := measurement_line(plan.config, plan.compute)) is not None:
        _say(console, f"{line}\n")
    for line in cache_lines(plan, chip):
        _say(console, line)
    if gpu_memory is not None:
        _say_advice(plan, gpu_memory, advised, console)


def verdict(plan: Plan, gpu_memory: int | None) -> str:
    """One sentence: how much memory is needed, and whether it fits."""
    overhead = size_text(plan.needed - plan.memory.peak)
    needed = f"about {size_text(plan.needed)} per GPU ({overhead} of it non-tensor overhead)"
    if gpu_memory is None:
        return f"{needed}; nothing was checked, because the memory of a GPU is unknown (--gpu-memory 80G)"
    fits = "fits" if plan.fits(gpu_memory) else "does not fit"
    return f"{needed}, {fits} into {size_text(gpu_memory)}"


def _say_workload(plan: Plan, console: Console) -> None:
    work, cluster = plan.work, plan.cluster
    ahead = plan.sizes.teacher is not None and work.accumulation > 1
    served = f"; one teacher forward serves {work.window} of them" if ahead else ""
    _say(
        console,
        f"{cluster.nodes} x {cluster.gpus_per_node} = {counted(cluster.ranks, 'rank')}, each with "
        f"{counted(work.accumulation, 'micro-batch')} of {counted(work.samples, 'sample')} per "
        f"optimizer step{served}",
    )
    image = f"{work.vision_tokens} of them for {counted(IMAGES_PER_SAMPLE, 'image')}"
    _say(console, f"worst case: {work.length} tokens per sample ({image}), all text supervised\n")
    if plan.config.training.train_vision_tower:
        _say(console, "warning: activations of the trained vision tower are not counted")


def _parameter_table(plan: Plan) -> Table:
    table = _table("parameters, M", *(name for name, _ in PARTS), "all", "trained")
    sizes = plan.sizes
    for name, model, trained in (
        ("teacher", sizes.teacher, 0),
        ("student", sizes.student, sum(sizes.student.trainable(trained_parts(plan.config)).values())),
    ):
        if model is not None:
            parts = [_million(model.count(prefix)) for _, prefix in PARTS]
            table.add_row(name, *parts, _million(model.count()), _million(trained))
    if sizes.adapters:
        adapters = _million(sum(sizes.adapters.values()))
        table.add_row("adapters", *[""] * len(PARTS), adapters, adapters)
    return table


def _memory_table(plan: Plan) -> Table:
    answers = any(part.phase == "answers" for part in plan.memory.parts)
    phases = PHASES if answers else tuple(phase for phase in PHASES if phase != "answers")
    heads = ["update" if phase == "optimizer" else phase for phase in phases]
    table = _table("memory of a rank, GiB", *heads, "host")
    for name in dict.fromkeys(part.name for part in plan.memory.parts):
        cells = dict.fromkeys([*phases, "host"], "")
        for part in plan.memory.parts:
            if part.name == name:
                cells["host" if part.in_host_memory else part.phase] = _gib(part.bytes)
        table.add_row(name, *cells.values())
    table.add_section()
    sums = [_gib(plan.memory.phase_bytes(phase)) for phase in phases]
    table.add_row("sum", *sums, _gib(plan.memory.host) if plan.memory.host else "")
    return table


def _say_fit(plan: Plan, gpu_memory: int | None, console: Console) -> None:
    moment = {
        "teacher": "during the teacher's forward",
        "student": "during the student's forward and backward",
        "optimizer": "during the optimizer's update",
        "answers": "while the student answers evaluation.task",
    }[plan.memory.peak_phase]
    _say(console, f"Peak {moment}: {verdict(plan, gpu_memory)}.")
    layers = sum(part.bytes for part in plan.memory.parts if part.name == "teacher's gathered layers")
    if plan.memory.teacher_alive > layers:
        alive = size_text(plan.memory.teacher_alive)
        _say(
            console, f"A GPU that is behind its host may hold {alive} of the teacher's layers, if it is free."
        )
    if plan.memory.host:
        _say(console, f"Host memory: {size_text(plan.host_per_node)} per node.")
    if gpu_memory is not None:
        largest = largest_micro_batch(plan, gpu_memory)
        is_all = largest == plan.config.training.global_batch_size // plan.cluster.ranks
        whole = ", all of a rank's samples in a step" if is_all else ""
        found = "none" if largest is None else counted(largest, "sample")
        _say(console, f"Largest micro-batch that fits with these settings: {found}{whole}.")
    _say(console, "")


def _traffic_table(plan: Plan) -> Table:
    table = _table("sent per optimizer step, GB", "in total", "to a GPU", "to a node")
    for transfer in plan.traffic:
        cells = (transfer.bytes * transfer.passes, transfer.received_by_rank, transfer.entering_node)
        table.add_row(transfer.name, *(_gb(value) for value in cells))
    table.add_section()
    table.add_row("sum", "", _gb(plan.received), _gb(plan.entering_node))
    return table


def _placement_table(plan: Plan, gpu_memory: int | None) -> Table:
    table = _table("teacher.placement", "GiB per GPU", "GB to a GPU", "GB to a node", "fits", "largest micro")
    for placement in dict.fromkeys([*PLACEMENTS, plan.config.teacher.placement]):
        other = with_placement(plan, placement)
        fits = largest = ""
        if gpu_memory is not None:
            fits = "yes" if other.fits(gpu_memory) else "no"
            largest = str(largest_micro_batch(other, gpu_memory) or "none")
        mark = " *" if placement == plan.config.teacher.placement else ""
        numbers = (_gib(other.needed), _gb(other.received), _gb(other.entering_node))
        table.add_row(placement + mark, *numbers, fits, largest)
    return table


def _say_speed(plan: Plan, chip: Chip, console: Console) -> None:
    compute, found = plan.compute, roofline(plan.config, plan.held, plan.work, plan.compute, chip)
    share = compute.teacher_flops / compute.flops
    _say(
        console,
        f"Compute per rank and step: {compute.flops / 1e12:,.0f} TFLOP, {share:.0%} of it by the teacher.",
    )
    tokens = compute.tokens * plan.cluster.ranks / found.seconds
    _say(
        console,
        f"On {chip.name}, {found.chip.peak / 1e12:,.0f} TFLOP/s, without any waiting: at least "
        f"{found.seconds:.2g} s per step, at most {tokens:,.0f} tokens/s in total, {found.peak_share:.0%} "
        "of the peak. Largest costs:",
    )
    for cost in found.costs[:LARGEST_COSTS]:
        seconds = cost.seconds(chip)
        _say(console, f"  {cost.name}: {seconds:.2g} s, {seconds / found.seconds:.0%}")
    _say(console, "")


def _say_advice(plan: Plan, gpu_memory: int, advised: Plan | None, console: Console) -> None:
    if advised is None:
        _say(console, f"Nothing fits into {size_text(gpu_memory)}, not even one sample with full offloading.")
        _say(console, "Use more GPUs or a smaller data.max_length.")
        return
    different = changes(plan, advised)
    if not different:
        _say(console, "Advice: keep these settings.")
        return
    _say(console, "Advice (--apply writes it into the file):")
    for key, value in different.items():
        _say(console, f"  {key} = {json.dumps(value) if not isinstance(value, str) else value}")
    host = f", {size_text(advised.host_per_node)} of host memory per node" if advised.memory.host else ""
    _say(console, f"  needs {size_text(advised.needed)} per GPU{host};")
    sent = [f"{_gb(advised.received)} GB to each GPU"] if plan.cluster.ranks > 1 else []
    sent += [f"{_gb(advised.entering_node)} GB to each node"] if plan.cluster.nodes > 1 else []
    sent += [f"{_gb(advised.through_host)} GB through host memory"] if advised.through_host else []
    _say(console, "  " + ", ".join([*sent, f"{advised.compute.flops / 1e12:,.0f} TFLOP per step"]))


def _show_table(table: Table, console: Console) -> None:
    """With an empty line after it, since the tables have no frames."""
    console.print(table)
    console.print()


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _million(elements: int) -> str:
    return f"{elements / 1e6:,.1f}"


def size_text(size: int) -> str:
    """In GiB; in MiB where that would round to nothing."""
    return f"{_gib(size)} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
