"""The text x vision block against dense softmax attention, and what collecting it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkd.config.schema import DistillationSection
from alignkd.data.batch import NO_ROW, ImagePlace
from alignkd.engine.student_step import StudentStep
from alignkd.losses.total import TERMS
from alignkd.models import attention, attention_term
from alignkd.models.attention import BlockLayout, text_vision_block
from alignkd.models.loading import BuildOptions, load_model
from alignkd.models.mobilevlm import MobileVLM
from alignkd.teacher.targets import TeacherModel
from tests import tiny

VISION_TOKENS = 3
SCALING = 0.4


def layout() -> BlockLayout:
    """Sample 0 has two images, sample 2 one, sample 1 none; their rows are ragged, and image 1 has none."""
    rows = [[3, 4, 8, 9, 10], [NO_ROW] * 5, [5, 11, NO_ROW, NO_ROW, NO_ROW]]
    return BlockLayout(
        places=(ImagePlace(0, 0, 5), ImagePlace(0, 5, 0), ImagePlace(2, 0, 2)),
        text_rows_IM=torch.tensor(rows),
        vision_tokens=VISION_TOKENS,
    )


def queries_and_keys(
    heads: int, key_heads: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """[3, heads, 12, 4] and [3, key_heads, 12, 4]."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, 12, 4, generator=generator, dtype=torch.float64)
    key = torch.randn(3, key_heads, 12, 4, generator=generator, dtype=torch.float64)
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()


def dense_block(query: torch.Tensor, key: torch.Tensor, asked: BlockLayout) -> torch.Tensor:
    """All of [B, H, L, L], then the block: what ``output_attentions`` would give."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * SCALING
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    maps = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
    block = maps.new_zeros(len(asked.places), query.shape[1], asked.text_rows_IM.shape[1], VISION_TOKENS)
    for image, (sample, start, _) in enumerate(asked.places):
        for place, row in enumerate(asked.text_rows_IM[image].tolist()):
            if row != NO_ROW:
                block[image, :, place] = maps[sample, :, row, start : start + VISION_TOKENS]
    return block


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 4, 128])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
def test_block_and_gradients_equal_the_dense_ones(
    monkeypatch: pytest.MonkeyPatch, heads: int, key_heads: int, rows_per_chunk: int
) -> None:
    monkeypatch.setattr(attention, "ROWS_PER_CHUNK", rows_per_chunk)
    query, key = queries_and_keys(heads, key_heads)
    block, dense = text_vision_block(query, key, SCALING, layout()), dense_block(query, key, layout())
    assert block.dtype == torch.float64
    assert dense[0].min() > 0
    assert not block[1].any()
    assert torch.allclose(block, dense, atol=1e-14)
    weights = torch.randn(block.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((block * weights).sum(), (query, key))
    theirs = torch.autograd.grad((dense * weights).sum(), (query, key))
    for got, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().max() > 1e-3
        assert torch.allclose(got, wanted, atol=1e-14)


def test_half_precision_is_summed_in_single() -> None:
    query, key = queries_and_keys(4, 2, torch.bfloat16)
    block = text_vision_block(query, key, SCALING, layout())
    assert block.dtype == torch.float32
    assert torch.allclose(block, dense_block(query.float(), key.float(), layout()), atol=5e-3)


def test_large_values_do_not_overflow_in_fp16() -> None:
    """fp16 ends at 65504: the products of these do not fit, the scaled scores do."""
    query, key = (150 * value for value in queries_and_keys(4, 2, torch.float16))
    assert (query @ key.repeat_interleave(2, dim=1).transpose(2, 3)).isinf().any()
    scaling = 2**-15
    block = text_vision_block(query, key, scaling, layout())
    expected = dense_block(query.float() * (scaling / SCALING), key.float(), layout())
    assert torch.allclose(block, expected, atol=5e-3)


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (2, 0)])
def test_nothing_asked_gives_an_empty_block(shape: tuple[int, int]) -> None:
    query, key = queries_and_keys(4, 2)
    asked = BlockLayout((ImagePlace(0, 0, 0),) * shape[0], torch.full(shape, NO_ROW), VISION_TOKENS)
    block = text_vision_block(query, key, SCALING, asked)
    assert block.shape == (shape[0], 4, shape[1], VISION_TOKENS)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of ``attention_rows`` as they come: the number of rows of each."""
    calls: list[int] = []
    real = attention.attention_rows

    def count(query: Any, key: Any, scaling: float, chunk: attention.Chunk) -> torch.Tensor:
        calls.append(len(chunk.rows_C))
        return real(query, key, scaling, chunk)

    monkeypatch.setattr(attention, "attention_rows", count)
    monkeypatch.setattr(attention_term, "attention_rows", count)
    return calls


@pytest.fixture(scope="module")
def student() -> MobileVLM:
    return load_model(tiny.STUDENT, BuildOptions(torch.float32))


@torch.no_grad()
def test_only_the_first_layer_computes_a_block(student: MobileVLM, counted: list[int]) -> None:
    batch = tiny.batch_of("v1", "rounds")
    assert student.config.num_hidden_layers == 2
    student(batch)
    assert counted == [place.rows for place in batch.image_places]
    student(batch, None)
    assert len(counted) == 2


@torch.no_grad()
def test_collecting_the_block_changes_no_output(student: MobileVLM) -> None:
    batch = tiny.batch_of("v1", "text", "rounds")
    collected, plain = student(batch), student(batch, None)
    assert plain.block is None
    assert torch.equal(collected.hidden_BLD, plain.hidden_BLD)
    assert torch.equal(collected.vision_tokens_IVD, plain.vision_tokens_IVD)


def test_gradient_checkpointing_changes_neither_losses_nor_gradients(counted: list[int]) -> None:
    teacher = TeacherModel(load_model(tiny.TEACHER, BuildOptions(torch.float32)), top_k=16)
    batch = tiny.batch_of("v1", "rounds", "text")
    targets, head = teacher(batch), teacher.model.head.weight
    results = []
    for checkpointing in (False, True):
        model = load_model(tiny.STUDENT, BuildOptions(torch.float32)).train()
        model.unfreeze_vision_tower()
        if checkpointing:
            model.enable_gradient_checkpointing()
        step = StudentStep(model, tiny.fixture_adapters(), DistillationSection())
        counted.clear()
        output = step(batch, tuple(0.1 * (number + 1) for number in range(len(TERMS))), targets, head)
        output.loss.backward()
        # Scores are made again in backward; with checkpointing the first layer runs once more besides.
        assert len(counted) == (6 if checkpointing else 4)
        results.append((output.sums, {name: p.grad for name, p in step.named_parameters()}))
    (sums, gradients), (checkpointed_sums, checkpointed) = results
    assert torch.equal(sums, checkpointed_sums)
    for name, gradient in gradients.items():
        if gradient is None:  # the tower's last layers, behind the selected hidden state
            assert name.startswith("student.vision_tower."), name
            assert checkpointed[name] is None, name
        else:
            assert torch.equal(gradient, checkpointed[name]), name
    query = "student.language_model.layers.0.self_attn.q_proj.weight"
    assert gradients[query].abs().max() > 1e-6
    assert gradients["student.vision_tower.embeddings.patch_embedding.weight"].abs().max() > 0
