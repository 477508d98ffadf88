from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from alignkd.data.batch import IGNORE_INDEX, IMAGE_TOKEN_ID, NO_ROW, TermCounts
from alignkd.data.collate import CollateSettings, Example, collate

V = 3
SHAPE = (3, 4, 4)
SETTINGS = CollateSettings(V, SHAPE)
N = IGNORE_INDEX


def example(ids, labels):
    """0 stands for an image marker in ``ids``; images are filled with their number."""
    ids = [IMAGE_TOKEN_ID if token == 0 else token for token in ids]
    images = tuple(torch.full(SHAPE, float(n)) for n in range(ids.count(IMAGE_TOKEN_ID)))
    return Example(ids, labels, images)


def flat_labels_of(examples, packing):
    """The label of every position of a batch, computed from the samples alone."""
    rows = []
    for sample in examples:
        marks = zip(sample.ids, sample.labels, strict=True)
        rows.append([label for token, label in marks for _ in range(V if token == IMAGE_TOKEN_ID else 1)])
    width = 0 if packing else max(map(len, rows))
    return torch.tensor([label for row in rows for label in row + [N] * (width - len(row))])


ONE = example([1, 5, 0, 6, 7, 2], [N, N, N, N, 7, 2])
TWO = example([1, 0, 0, 8, 0, 9, 2], [N, N, N, N, N, 9, 2])
LAST = example([1, 4, 0], [N, 4, N])
TEXT = example([1, 5, 6, 2], [N, N, 6, 2])
I = IMAGE_TOKEN_ID  # noqa: E741


def test_a_padded_batch_equals_one_worked_out_by_hand():
    batch = collate([ONE, TEXT, TWO], SETTINGS)
    assert batch.input_ids_BL.tolist() == [
        [1, 5, I, I, I, 6, 7, 2, 0, 0, 0, 0, 0],
        [1, 5, 6, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, I, I, I, I, I, I, 8, I, I, I, 9, 2],
    ]
    assert batch.sample_count == 3
    assert batch.image_count == 4
    assert batch.image_samples.tolist() == [0, 2, 2, 2]
    assert batch.image_starts.tolist() == [2, 1, 4, 8]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [0, 0, 1, 2]
    assert batch.text_rows_IM.tolist() == [[5, 6, 7], [7, 11, 12], [7, 11, 12], [11, 12, NO_ROW]]
    assert batch.logit_positions_N.tolist() == [5, 6, 13 + 1, 13 + 2, 26 + 10, 26 + 11]
    assert batch.logit_labels_N.tolist() == [7, 2, 6, 2, 9, 2]
    assert batch.counts == TermCounts(
        supervised=6,
        logits=6,
        attention_pairs=11 * V,
        vision_tokens=4 * V,
        focus_tokens=4 * V,  # K is larger
        tokens=25,
        samples=3,
        slots=39,
    )


PACKED = collate([ONE, TEXT, TWO], replace(SETTINGS, packing=True))


def test_a_packed_batch_equals_one_worked_out_by_hand():
    padded = collate([ONE, TEXT, TWO], SETTINGS)
    assert PACKED.input_ids_BL.tolist() == [
        [1, 5, I, I, I, 6, 7, 2, 1, 5, 6, 2, 1, I, I, I, I, I, I, 8, I, I, I, 9, 2]
    ]
    assert PACKED.segments == (8, 4, 13)
    assert PACKED.segment_bounds.tolist() == [0, 8, 12, 25]
    assert PACKED.segment_bounds.dtype == torch.int32
    assert PACKED.sample_count == 3
    assert PACKED.position_ids_BL.tolist() == [[*range(8), *range(4), *range(13)]]
    assert PACKED.image_samples.tolist() == [0, 0, 0, 0]
    assert PACKED.image_starts.tolist() == [2, 13, 16, 20]
    assert PACKED.image_places == padded.image_places == ((0, 2, 3), (2, 1, 3), (2, 4, 3), (2, 8, 2))
    assert PACKED.text_rows_IM.tolist() == [[5, 6, 7], [19, 23, 24], [19, 23, 24], [23, 24, NO_ROW]]
    assert PACKED.logit_positions_N.tolist() == [5, 6, 8 + 1, 8 + 2, 12 + 10, 12 + 11]
    assert PACKED.logit_labels_N.tolist() == padded.logit_labels_N.tolist()
    assert PACKED.counts == replace(padded.counts, slots=25)
    assert (padded.segments, padded.position_ids_BL, padded.segment_bounds) == ((), None, None)


def test_the_last_token_of_a_packed_sample_has_no_next_one():
    """Its neighbour is supervised from its first token on, as the template `plain` without a BOS would be."""
    first = example([7, 7], [7, 7])
    for positions in ("supervised", "all_text"):
        batch = collate([first, first], CollateSettings(V, SHAPE, logit_positions=positions, packing=True))
        assert batch.logit_positions_N.tolist() == [0, 2]


def test_a_packed_batch_without_samples_is_one_masked_segment():
    batch = collate([], replace(SETTINGS, packing=True))
    assert (batch.segments, batch.position_ids_BL.tolist()) == ((1,), [[0]])
    assert batch.counts == TermCounts()


def test_a_batch_moves_with_all_of_its_tensors():
    moved = PACKED.to("meta")
    devices = [value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert devices == ["meta"] * 9
    assert moved.counts == PACKED.counts


def test_prompt_only_rows_leave_supervised_tokens_out():
    batch = collate([ONE, TWO], CollateSettings(V, SHAPE, attention_rows="prompt_only"))
    assert batch.text_rows_IM.tolist() == [[5], [7], [7], [NO_ROW]]
    counts = batch.counts
    assert (counts.attention_pairs, counts.vision_tokens, counts.focus_tokens) == (3 * V, 4 * V, 3 * V)


def test_all_text_positions_keep_unsupervised_ones_without_a_label():
    batch = collate([ONE, TEXT], CollateSettings(V, SHAPE, logit_positions="all_text"))
    assert batch.logit_positions_N.tolist() == [0, 4, 5, 6, 8 + 0, 8 + 1, 8 + 2]
    assert batch.logit_labels_N.tolist() == [N, N, 7, 2, N, 6, 2]
    assert (batch.counts.logits, batch.counts.supervised) == (7, 4)


def test_an_image_with_no_text_after_it_has_no_rows():
    batch = collate([LAST], SETTINGS)
    assert batch.text_rows_IM.shape == (1, 0)
    assert batch.counts == TermCounts(supervised=1, logits=1, vision_tokens=V, tokens=5, samples=1, slots=5)


def test_text_only_gets_one_zero_image_that_does_not_count():
    batch = collate([TEXT], SETTINGS)
    assert batch.image_count == 0
    assert batch.pixel_values.shape == (1, *SHAPE)
    assert not batch.pixel_values.any()
    assert batch.image_samples.shape == batch.image_starts.shape == (0,)
    assert batch.text_rows_IM.shape == (0, 0)
    assert batch.counts == TermCounts(supervised=2, logits=2, tokens=4, samples=1, slots=4)


def test_no_sample_gives_an_all_masked_batch():
    batch = collate([], SETTINGS, skipped=2)
    assert batch.input_ids_BL.shape == (1, 1)
    assert batch.sample_count == 1
    assert len(batch.logit_labels_N) == 0
    assert len(batch.logit_positions_N) == 0
    assert batch.counts == TermCounts(skipped=2)


@pytest.mark.parametrize("rows", ["all_text", "prompt_only"])
@pytest.mark.parametrize("positions", ["supervised", "all_text"])
@pytest.mark.parametrize("packing", [False, True])
def test_counts_of_a_batch_are_the_sum_over_its_samples(rows, positions, packing):
    settings = CollateSettings(V, SHAPE, attention_rows=rows, logit_positions=positions, packing=packing)
    generator = np.random.default_rng(0)
    for _ in range(50):
        samples = []
        for _ in range(generator.integers(1, 6)):
            ids = [1, *generator.choice([0, 3, 4, 5], size=generator.integers(1, 12))]
            keep = generator.random(len(ids)) < 0.5
            labels = [int(t) if t > 1 and k else N for t, k in zip(ids, keep, strict=True)]
            samples.append(example([int(t) for t in ids], labels))
        batch = collate(samples, settings)
        single = sum((collate([sample], settings).counts for sample in samples), TermCounts())
        assert replace(batch.counts, slots=0) == replace(single, slots=0)
        assert batch.counts.slots == batch.input_ids_BL.numel()
        assert not packing or batch.counts.slots == batch.counts.tokens
        flat_ids, flat_labels = batch.input_ids_BL.flatten(), flat_labels_of(samples, packing)
        assert torch.equal(flat_labels[batch.logit_positions_N + 1], batch.logit_labels_N)
        assert not (flat_ids[batch.logit_positions_N + 1] == I).any()
        for image, rows_M in enumerate(batch.text_rows_IM):
            sample, columns = batch.image_samples[image], rows_M[rows_M != NO_ROW]
            assert (batch.input_ids_BL[sample, columns] > 0).all()
            assert (columns > batch.image_starts[image]).all()
            start = batch.image_starts[image]
            assert (batch.input_ids_BL[sample, start : start + V] == I).all()


def test_integer_tensors_are_int64_but_for_the_bounds_that_a_kernel_wants_in_32_bits():
    dtypes = {"pixel_values": torch.float32, "segment_bounds": torch.int32}
    for batch in (*(collate(examples, SETTINGS) for examples in ([ONE, TWO], [TEXT], [])), PACKED):
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == dtypes.get(name, torch.int64), name
