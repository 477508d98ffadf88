"""A checkpoint in DeepSpeed's universal format, which any number of ranks can load.

``step-N.universal`` is made from ``step-N`` and bound to it by the hash of its manifest. It is written in
``step-N.universal.ATTEMPT.tmp`` and comes to count like a checkpoint: manifest, rename, marker. A killed
conversion leaves the checkpoint untouched, and a ``.tmp`` that the next one removes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal

from alignkd.checkpoint.storage import Storage
from alignkd.errors import CheckpointError, TrainingError
from alignkd.run_folder.atomic_files import flush_to_disk
from alignkd.run_folder.checkpoints import (
    MANIFEST,
    is_marked,
    new_attempt,
    partial_folder,
    read_manifest,
    step_folder,
    stored_bytes,
    universal_folder,
)
from alignkd.run_folder.drift import saved_stage
from alignkd.run_folder.verification import data_files, describe, problems_of
from alignkd.run_folder.writer_lock import WriterLock

log = logging.getLogger(__name__)
SPACE_FACTOR = 2.2  # of the checkpoint: fragments of all ranks, and what is merged from them
OPTIMIZER_STATE = "zero/optimizer_state.pt"


def is_converted(run: Path, step: int) -> bool:
    """Whether there is a finished conversion of this very checkpoint. (Its files are not hashed here.)"""
    folder = universal_folder(run, step)
    try:
        source = read_manifest(folder)["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return is_marked(folder) and source == _source_hash(run, step)


def convert(run: Path, step: int, storage: Storage) -> None:
    """Make ``step-N.universal`` from ``step-N``, whose files must have been verified against its manifest:
    they are unpickled. One process, no GPU. A finished conversion is kept.

    Raises CheckpointError when this checkpoint cannot be converted, TrainingError when the disk fails.
    """
    source, final = step_folder(run, step), universal_folder(run, step)
    partial = partial_folder(final, new_attempt())
    if is_converted(run, step):
        return
    manifest = read_manifest(source)
    if saved_stage(manifest) == 0:
        raise CheckpointError(f"{source}: student.zero_stage is 0; DeepSpeed converts stages 1, 2 and 3 only")
    try:
        for left_over in final.parent.glob(partial_folder(final, "*").name):
            with contextlib.suppress(OSError):  # a writer that was given up may still write there
                storage.remove(left_over)
        storage.remove(final)
        _check_space(source, manifest)
        partial.mkdir()
        run_deepspeed(source, partial)
        _without_shards(partial / OPTIMIZER_STATE)
        names = data_files(partial)
        for name in names:
            flush_to_disk(partial / name)
        for folder in {(partial / name).parent for name in names}:
            flush_to_disk(folder)
        files = {name: describe(partial, name) for name in names}
        facts = {"step": step, "world_size": manifest["world_size"], "zero_stage": saved_stage(manifest)}
        storage.write_manifest(partial, {**facts, "source": _source_hash(run, step), "files": files})
        storage.publish(partial, final)
        storage.mark(final)
    except (OSError, CheckpointError) as error:
        with contextlib.suppress(OSError):
            storage.remove(partial)  # an incomplete one only takes room
        if isinstance(error, CheckpointError):
            raise
        raise TrainingError(f"{source}: could not be converted: {error}") from error


def convert_by_hand(run: Path, step: int) -> tuple[Path, bool]:
    """:func:`convert` for ``alignkd ckpt convert``, with verification: the folder, and whether it was made
    now. Raises UserError naming what is wrong, or when a job writes the run."""
    source, final = step_folder(run, step), universal_folder(run, step)
    with WriterLock(run, log.warning):
        if is_converted(run, step) and not problems_of(final):
            return final, False
        problems = problems_of(source)
        if problems:
            raise CheckpointError(f"{source}: {'; '.join(problems[:3])}")
        storage = Storage()
        storage.remove(final)
        convert(run, step, storage)
    return final, True


def _source_hash(run: Path, step: int) -> str:
    return hashlib.sha256((step_folder(run, step) / MANIFEST).read_bytes()).hexdigest()


def _check_space(source: Path, manifest: dict[str, Any]) -> None:
    needed = int(SPACE_FACTOR * stored_bytes(manifest))
    free = shutil.disk_usage(source.parent).free
    if free < needed:
        raise CheckpointError(
            f"{source}: its conversion for another number of ranks takes about {needed:,} bytes, and "
            f"{free:,} are free; make room"
        )


def run_deepspeed(source: Path, partial: Path) -> None:
    """DeepSpeed's own conversion, in this process.

    It uses paths as patterns, so it is given links whose names hold no special characters. It also writes a
    ``latest_universal`` beside its output, which is removed with the links.
    """
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as links:
        for name, folder in (("source", source), ("target", partial)):
            (Path(links) / name).symlink_to(folder.resolve())
        arguments = argparse.Namespace(
            input_folder=f"{links}/source",
            output_folder=f"{links}/target",
            num_extract_workers=1,  # in this process: a child would outlive it when it is killed
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # of checkpoints that were saved without it
        )
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                ds_to_universal.main(arguments)
        except OSError:
            raise
        except Exception as error:
            raise CheckpointError(f"{source}: DeepSpeed cannot convert it: {error!r}") from error


def _without_shards(path: Path) -> None:
    """At stage 3 DeepSpeed leaves rank 0's whole optimizer shard in the file from which every rank reads the
    step and the groups' settings."""
    state = torch.load(path, weights_only=False, map_location="cpu")
    if "fp32_flat_groups" not in state:
        return
    del state["fp32_flat_groups"]
    inner = state["optimizer_state_dict"]
    inner["state"] = {0: {"step": inner["state"][0]["step"]}}
    torch.save(state, path)
