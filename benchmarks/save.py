"""How long a save holds training, synchronous against asynchronous: ``python -m benchmarks.save``.

Real DeepSpeed ranks under the local back end save a network of the size that is asked for through the same
saver as a run does; the table also says how much slower a step is while files are being written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.run_folder.paths import RunPaths
from launcher.backends.ranks import free_port, rank_environments, start_ranks

WIDTH = 1024
WARM_UP = 3


@dataclass(frozen=True)
class Measured:
    held: list[float]  # seconds that training stood still, per save
    written: list[float]  # seconds of the slowest rank's thread, per save; synchronous: hashing alone
    beside: list[float]  # seconds of steps beside the writer
    alone: list[float]  # seconds of steps without one
    bytes: int


def build_engine(parameters: int, stage: int, ranks: Any) -> Any:
    import deepspeed
    import torch

    from alignkd.checkpoint.shard_files import attach_shard_files

    layers = max(1, round(parameters / WIDTH**2))
    module = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(module.to(ranks.device).parameters(), lr=1e-4)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
    attach_shard_files(engine)
    return engine


def measure(engine: Any, ranks: Any, folder: Path, asynchronous: bool, saves: int) -> Measured:
    import torch

    from alignkd.checkpoint.resume import CheckpointSearch
    from alignkd.checkpoint.save import CheckpointSaver
    from alignkd.checkpoint.storage import Storage
    from alignkd.config.checkpoint_section import CheckpointSection

    section = CheckpointSection(asynchronous=asynchronous, keep_last=1)
    saver = CheckpointSaver(folder, section, ranks, Storage(), CheckpointSearch(None, (), ()))
    batch = torch.randn(8, WIDTH, device=ranks.device, dtype=torch.bfloat16)
    result = Measured([], [], [], [], 0)

    def step() -> float:
        started = time.perf_counter()
        engine.backward(engine(batch).float().square().mean())
        engine.step()
        ranks.barrier()
        return time.perf_counter() - started

    for _ in range(WARM_UP):
        step()
    result.alone.extend(step() for _ in range(5))
    for number in range(1, saves + 1):
        before = saver.totals
        saver.save(engine, number, {}, wait=False)
        while saver.in_flight:
            result.beside.append(step())
            # As the training loop does: the flag travels with a host all-reduce.
            if ranks.sum_on_host([int(saver.written)])[0] == ranks.world_size:
                saver.finish()
        after = saver.totals
        result.held.append(after.held_seconds - before.held_seconds)
        result.written.append(after.write_seconds - before.write_seconds)
    return Measured(result.held, result.written, result.beside, result.alone, saver.totals.bytes)


def run_rank(options: argparse.Namespace) -> None:
    from alignkd.distributed.ranks import start_ranks as join

    ranks = join()
    engine = build_engine(int(options.parameters), options.stage, ranks)
    lines = [
        "| save | GB | training held, s | writer thread, s | step alone, s | step beside the writer, s |",
        "|---|---|---|---|---|---|",
    ]
    for asynchronous in (False, True):
        folder = options.folder / f"asynchronous-{asynchronous}"
        measured = measure(engine, ranks, folder, asynchronous, options.saves)
        beside = f"{statistics.median(measured.beside):.3f}" if measured.beside else ""
        lines.append(
            f"| {'asynchronous' if asynchronous else 'synchronous'} | {measured.bytes / 1e9:.2f} "
            f"| {statistics.median(measured.held):.2f} | {statistics.median(measured.written):.2f} "
            f"| {statistics.median(measured.alone):.3f} | {beside} |"
        )
    if ranks.is_first:
        text = f"{options.parameters:.3g} parameters, {ranks.world_size} ranks, ZeRO stage {options.stage}, "
        text += f"bf16, {os.cpu_count()} CPU cores, {ranks.device.type}; medians of {options.saves} saves"
        (options.folder / "table.md").write_text("\n".join([text, "", *lines]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.save", description=__doc__)
    parser.add_argument("--parameters", type=float, default=50e6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2, 3))
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "auto"), default="cpu")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(options)
        return 0
    made = options.folder is None
    folder = Path(tempfile.mkdtemp(prefix="alignkd-save-")) if made else options.folder
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(options.ranks)))).split(",")
    environments = rank_environments(1, options.ranks, free_port(), options.device, visible, os.environ)
    command = [sys.executable, "-m", "benchmarks.save", "--folder", str(folder)]
    for name in ("parameters", "stage", "saves"):
        command += [f"--{name}", str(getattr(options, name))]
    group = start_ranks(command, environments, RunPaths(folder).logs)
    while group.running and not any(group.codes.values()):
        group.next_exit(timeout=1.0)
    group.kill()
    if any(group.codes.values()):
        print(RunPaths(folder).log(0).read_text()[-3000:], file=sys.stderr)
        return 1
    print((folder / "table.md").read_text(), end="")
    if made:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
