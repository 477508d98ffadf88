"""One teacher forward for several micro-batches.

A sharded teacher gathers all its weights in every forward, so one forward per micro-batch would make its
traffic grow with accumulation. Of the joint forward only compact targets are kept, split by micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from alignkd.data.batch import Batch
from alignkd.data.join import join
from alignkd.teacher.provider import Teacher
from alignkd.teacher.targets import TeacherTargets


def targets_ahead(
    teacher: Teacher, window: Sequence[Batch], lookahead: int | None, watch: AbstractContextManager[None]
) -> Iterator[TeacherTargets]:
    """Targets of each micro-batch of ``window``. A forward, timed by ``watch``, serves ``lookahead`` of them
    (None: all) and runs when the first of them is asked for. Collective when the teacher is sharded: every
    rank runs equally many forwards.
    """
    size = lookahead or len(window)
    for start in range(0, len(window), size):
        served = window[start : start + size]
        with watch:
            parts = split_targets(teacher.targets(join(served)), served)
        yield from parts


def split_targets(targets: TeacherTargets, batches: Sequence[Batch]) -> list[TeacherTargets]:
    """Views of a joined batch's targets, one set per micro-batch."""
    parts, image, position = [], 0, 0
    for batch in batches:
        images = slice(image, image + batch.image_count)
        positions = slice(position, position + batch.counts.logits)
        image, position = images.stop, positions.stop
        patches = targets.patches_IPC
        if patches is not None:
            # A batch without images takes any image: its projector output is multiplied by zero.
            patches = patches[images] if batch.image_count else patches[:1]
        # Images of the other batches may have more vision tokens. Focus indices are sorted by score, so those
        # that a smaller image lacks are the last ones. They may be any column of the joint batch: of an image
        # that has some, the last column here is empty too, and adds nothing.
        V = None if batch.columns_IV is None else batch.columns_IV.shape[1]
        focus_IK = targets.focus_indices_IK[images, :V]
        parts.append(
            TeacherTargets(
                hidden_ND=targets.hidden_ND[positions],
                block_IHMV=targets.block_IHMV[images, :, : batch.text_rows_IM.shape[1], :V],
                vision_tokens_IVD=targets.vision_tokens_IVD[images, :V],
                focus_indices_IK=focus_IK if V is None else focus_IK.clamp(max=V - 1),
                patches_IPC=patches,
                top=None if targets.top is None else targets.top.at(positions),
            )
        )
    return parts
