"""The floor's steps with a plain AdamW, on a run's models and samples: ``python -m benchmarks.whole.floor``.

One process per rank, with the threads that a rank has. All batches are read before the first step. Ranks add
their gradients up in one all-reduce after the backward; nothing is sharded, clipped, saved or written down.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from alignkd.config import load_run_config
from alignkd.data.batch import Batch
from alignkd.data.index_file import read_index
from alignkd.data.loader import build_loader
from alignkd.models.building import BuildOptions
from alignkd.models.encoding import student_encoder
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.loading import load_model
from alignkd.run_folder.paths import RunPaths
from benchmarks.references import floor
from benchmarks.setting import Setting, new_setting
from benchmarks.whole.parts import FloorRun


def measure(run: Path, rank: int, ranks: int) -> FloorRun:
    """Every step of ``run``, timed by part. Collective over ``ranks`` processes."""
    config = load_run_config(RunPaths(run).config)
    assert config.model.teacher is not None, "the benchmark's runs distil"
    device = torch.device("cpu")
    models = [
        load_model(folder, BuildOptions(torch.float32))
        for folder in (config.model.teacher, config.model.student)
    ]
    teacher, student = (model for model in models if isinstance(model, MobileVLM))
    setting = new_setting(teacher, student, device)
    windows = _windows(run, rank, ranks)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    teacher_done = 0.0

    def mark(*_: object) -> None:
        nonlocal teacher_done
        teacher_done = time.perf_counter()

    teacher.language_model.register_forward_hook(mark)
    found, cross_entropy = [], 0.0
    for number, window in enumerate(windows):
        start = time.perf_counter()
        sums = floor(setting, window)
        _add_up(trained, ranks)
        backward_done = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        seconds = {"teacher": teacher_done - start, "student": backward_done - teacher_done}
        found.append({**seconds, "optimizer": end - backward_done})
        if number == 0:
            cross_entropy = _mean(setting, sums["ce"], window, ranks)
    return FloorRun(found, cross_entropy)


def _windows(run: Path, rank: int, ranks: int) -> list[list[Batch]]:
    config = load_run_config(RunPaths(run).config)
    # Padded, as the floor is; all samples are of one length.
    training = config.training.model_copy(update={"packing": False})
    data = config.data.model_copy(update={"workers": 0})
    padded = config.model_copy(update={"training": training, "data": data})
    stored = read_index(RunPaths(run).index)
    assert stored is not None, "the run is done"
    with build_loader(padded, stored.index, student_encoder(padded), rank, ranks, 1) as loader:
        return list(loader)


def _add_up(parameters: list[torch.nn.Parameter], ranks: int) -> None:
    if ranks == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= ranks
    for gradient, part in zip(gradients, torch.split(flat, [one.numel() for one in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _mean(setting: Setting, total: torch.Tensor, window: list[Batch], ranks: int) -> float:
    counted = torch.tensor([float(total), float(setting.elements(window)["ce"])], dtype=torch.float64)
    if ranks > 1:
        dist.all_reduce(counted)
    return float(counted[0] / counted[1])


def main(run: str, out: str) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("gloo")
    result = measure(Path(run), rank, ranks)
    if rank == 0:
        Path(out).write_text(json.dumps(result.steps_and_loss()), encoding="utf-8")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
