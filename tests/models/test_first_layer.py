"""Queries and keys of the first layer: the right ones, handed out once, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignkd.config.schema import DistillationSection
from alignkd.engine.student_step import StudentStep
from alignkd.losses import attention
from alignkd.losses.total import TERMS
from alignkd.models.attention import FirstLayerAttention, FirstLayerCapture
from alignkd.models.building import BuildOptions
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.loading import load_model
from alignkd.teacher.targets import TeacherModel
from tests import tiny


@pytest.fixture(scope="module")
def student() -> MobileVLM:
    return load_model(tiny.STUDENT, BuildOptions(torch.float32))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of ``attention_rows`` as they come: the number of rows of each."""
    calls: list[int] = []
    real = attention.attention_rows

    def count(query: Any, key: Any, scaling: float, chunk: attention.Chunk) -> torch.Tensor:
        calls.append(len(chunk.rows_C))
        return real(query, key, scaling, chunk)

    monkeypatch.setattr(attention, "attention_rows", count)
    return calls


@torch.no_grad()
def test_queries_and_keys_give_the_attention_map_of_layer_0(student: MobileVLM) -> None:
    """The whole causal map, against the eager attention of transformers."""
    batch = tiny.batch_of("v1")
    query_BHLE, key_BGLE, scaling = student(batch).first_layer
    scores = query_BHLE @ key_BGLE.transpose(2, 3) * scaling
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    ours = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
    eager = load_model(tiny.STUDENT, BuildOptions(torch.float32))
    eager.language_model.config._attn_implementation = "eager"
    eager.language_model.layers[0].self_attn.config = eager.language_model.config
    embeddings = eager.embed(batch, eager.vision_tokens(batch.pixel_values))
    maps = eager.language_model(inputs_embeds=embeddings, output_attentions=True).attentions
    assert torch.allclose(ours, maps[0], atol=1e-6)
    assert not torch.allclose(ours, maps[1], atol=1e-3)


@torch.no_grad()
def test_a_model_computes_no_attention_rows_itself(student: MobileVLM, counted: list[int]) -> None:
    student(tiny.batch_of("v1", "rounds"))
    assert counted == []


@torch.no_grad()
def test_the_teacher_computes_one_block_per_image(counted: list[int]) -> None:
    batch = tiny.batch_of("v1", "rounds")
    TeacherModel(load_model(tiny.TEACHER, BuildOptions(torch.float32)), top_k=16)(batch)
    assert counted == [place.rows for place in batch.image_places]


@torch.no_grad()
def test_the_capture_changes_no_output(student: MobileVLM) -> None:
    batch = tiny.batch_of("v1", "text", "rounds")
    captured = student(batch)
    embeddings = student.embed(batch, captured.vision_tokens_IVD)
    plain = student.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    assert torch.equal(captured.hidden_BLD, plain)


def test_only_the_first_call_is_captured_and_nothing_is_left_behind() -> None:
    first, second = (FirstLayerAttention(torch.zeros(1), torch.zeros(1), scale) for scale in (1.0, 2.0))
    capture = FirstLayerCapture()
    capture.offer(first)
    capture.offer(second)
    assert capture.take() is first
    capture.offer(second)
    with pytest.raises(AssertionError):
        capture.take()


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
        # Two images: their rows are computed in forward and again in backward, but not in a recomputed layer.
        assert len(counted) == 4
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


@pytest.mark.parametrize("term", range(2, 5))
def test_gradients_of_each_alignment_term_survive_checkpointing(term: int) -> None:
    teacher = TeacherModel(load_model(tiny.TEACHER, BuildOptions(torch.float32)), top_k=16)
    batch = tiny.batch_of("v1", "rounds")
    targets, head = teacher(batch), teacher.model.head.weight
    scales = tuple(float(number == term) for number in range(len(TERMS)))
    gradients = []
    for checkpointing in (False, True):
        model = load_model(tiny.STUDENT, BuildOptions(torch.float32)).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        step = StudentStep(model, tiny.fixture_adapters(), DistillationSection())
        step(batch, scales, targets, head).loss.backward()
        gradients.append({name: p.grad for name, p in step.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    reached = [name for name, gradient in gradients[0].items() if gradient.any()]
    assert any(name.startswith("student.projector") for name in reached)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
