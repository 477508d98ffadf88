"""Joins micro-batches into one ``Batch`` on their device, without synchronising with it.

This is how the teacher looks ahead: it runs one forward pass over several micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch.nn import functional as F

from alignkd.data.batch import NO_COLUMN, NO_ROW, PADDING_ID, Batch, TermCounts
from alignkd.data.tower_inputs import joined_inputs


def join(batches: Sequence[Batch]) -> Batch:
    """Join batches that are all packed, into one row, or all padded, row by row.

    Real images keep their order; the zero images of text-only batches are dropped if there are real ones.
    """
    if len(batches) == 1:
        return batches[0]
    first = batches[0]
    packed = bool(first.segments)
    assert all(bool(batch.segments) == packed for batch in batches), "all packed or all padded"
    columns = [batch.input_ids_BL.shape[1] for batch in batches]
    samples_before = _before([batch.sample_count for batch in batches])
    # Offsets of rows and of columns.
    rows = [0] * len(batches) if packed else _before([len(batch.input_ids_BL) for batch in batches])
    shifts = _before(columns) if packed else [0] * len(batches)
    width = sum(columns) if packed else max(columns)
    inputs = joined_inputs(
        [
            {"pixel_values": batch.pixel_values, **batch.image_inputs}
            for batch in [batch for batch in batches if batch.image_count] or batches[:1]
        ]
    )
    theirs = [batch.of_teacher for batch in batches if batch.of_teacher is not None]
    joined = replace(
        first,
        of_teacher=join(theirs) if theirs else None,
        grids=tuple(grid for batch in batches for grid in batch.grids),
        input_ids_BL=_joined_rows([batch.input_ids_BL for batch in batches], packed),
        pixel_values=inputs.pop("pixel_values"),
        image_count=sum(batch.image_count for batch in batches),
        image_samples=torch.cat(
            [batch.image_samples + row for batch, row in zip(batches, rows, strict=True)]
        ),
        image_starts=torch.cat(
            [batch.image_starts + shift for batch, shift in zip(batches, shifts, strict=True)]
        ),
        text_rows_IM=_joined_text_rows(batches, shifts),
        columns_IV=_joined_columns(batches),
        image_spans=tuple(span for batch in batches for span in batch.image_spans),
        image_inputs=inputs,
        logit_positions_N=torch.cat(
            [
                _moved_positions(batch.logit_positions_N, before, width, row, shift)
                for batch, before, row, shift in zip(batches, columns, rows, shifts, strict=True)
            ]
        ),
        logit_labels_N=torch.cat([batch.logit_labels_N for batch in batches]),
        teacher_hidden_ND=_joined_cached([batch.teacher_hidden_ND for batch in batches]),
        teacher_tokens_NK=_joined_cached([batch.teacher_tokens_NK for batch in batches]),
        teacher_log_probs_NR=_joined_cached([batch.teacher_log_probs_NR for batch in batches]),
        counts=sum((batch.counts for batch in batches), start=TermCounts()),
        image_places=tuple(
            place._replace(sample=place.sample + before)
            for batch, before in zip(batches, samples_before, strict=True)
            for place in batch.image_places
        ),
        segments=tuple(length for batch in batches for length in batch.segments),
    )
    if not packed:
        return joined
    positions = [batch.position_ids_BL for batch in batches if batch.position_ids_BL is not None]
    return replace(
        joined, position_ids_BL=torch.cat(positions, dim=1), segment_bounds=_joined_bounds(batches, shifts)
    )


def _joined_cached(of_batches: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    cached = [tensor for tensor in of_batches if tensor is not None]
    assert len(cached) in (0, len(of_batches)), "one loader made all of them"
    return torch.cat(cached) if cached else None


def _joined_bounds(batches: Sequence[Batch], shifts: Sequence[int]) -> torch.Tensor:
    """The end of one batch is the beginning of the next."""
    moved = [
        batch.segment_bounds + shift
        for batch, shift in zip(batches, shifts, strict=True)
        if batch.segment_bounds is not None
    ]
    return torch.cat([*(bounds[:-1] for bounds in moved), moved[-1][-1:]])


def _before(sizes: Sequence[int]) -> list[int]:
    """The sum of the sizes before each one."""
    return [0, *accumulate(sizes)][:-1]


def _joined_rows(tensors_BL: Sequence[torch.Tensor], packed: bool) -> torch.Tensor:
    if packed:
        return torch.cat(list(tensors_BL), dim=1)
    width = max(tensor.shape[1] for tensor in tensors_BL)
    return torch.cat([F.pad(tensor, (0, width - tensor.shape[1]), value=PADDING_ID) for tensor in tensors_BL])


def _joined_text_rows(batches: Sequence[Batch], shifts: Sequence[int]) -> torch.Tensor:
    most = max(batch.text_rows_IM.shape[1] for batch in batches)
    moved = [
        torch.where(batch.text_rows_IM >= 0, batch.text_rows_IM + shift, NO_ROW)
        for batch, shift in zip(batches, shifts, strict=True)
    ]
    return torch.cat([F.pad(rows, (0, most - rows.shape[1]), value=NO_ROW) for rows in moved])


def _joined_columns(batches: Sequence[Batch]) -> torch.Tensor | None:
    columns = [batch.columns_IV for batch in batches if batch.columns_IV is not None]
    most = max((of.shape[1] for of in columns), default=0)
    padded = [F.pad(of, (0, most - of.shape[1]), value=NO_COLUMN) for of in columns]
    return torch.cat(padded) if padded else None


def _moved_positions(
    positions_N: torch.Tensor, columns: int, width: int, row: int, shift: int
) -> torch.Tensor:
    """Flat positions in rows of ``columns`` columns, moved to the same places in rows of ``width``
    columns."""
    return (positions_N // columns + row) * width + positions_N % columns + shift
