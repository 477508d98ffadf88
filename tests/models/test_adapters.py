"""P_attn and P_V: shapes of any pair of models, seeds, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignkd.errors import CheckpointError
from alignkd.models.adapters import load_adapters, seeded_adapters
from alignkd.models.configuration import read_model_config
from tests import tiny

TEACHER, STUDENT = read_model_config(tiny.TEACHER), read_model_config(tiny.STUDENT)


@pytest.mark.parametrize(
    ("teacher_heads", "teacher_width", "heads", "width"), [(32, 64, 16, 32), (3, 9, 8, 40), (1, 4, 1, 4)]
)
def test_any_pair_of_heads_and_widths(teacher_heads: int, teacher_width: int, heads: int, width: int) -> None:
    teacher = replace(TEACHER, num_attention_heads=teacher_heads, hidden_size=teacher_width)
    student = replace(STUDENT, num_attention_heads=heads, hidden_size=width)
    shapes = {name: tuple(p.shape) for name, p in seeded_adapters(teacher, student, 0).named_parameters()}
    assert shapes == {
        "attention.weight": (heads, teacher_heads),
        "attention.bias": (heads,),
        "vision.weight": (width, teacher_width),
        "vision.bias": (width,),
    }


def test_p_attn_lends_its_weights_and_passes_queries_and_keys_through() -> None:
    """What is computed with them is in ``losses.attention`` (and tested as a convolution there)."""
    adapter = seeded_adapters(TEACHER, STUDENT, 0).attention
    query, key = torch.randn(2), torch.randn(3)
    given = adapter(query, key, lambda *arguments: arguments)
    wanted = (query, key, adapter.weight, adapter.bias)
    assert all(got is value for got, value in zip(given, wanted, strict=True))


def test_the_seed_alone_determines_the_adapters() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = seeded_adapters(TEACHER, STUDENT, 1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = (seeded_adapters(TEACHER, STUDENT, seed).state_dict() for seed in (1, 2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name


def test_a_file_is_read_back(tmp_path: Path) -> None:
    adapters = seeded_adapters(TEACHER, STUDENT, 1)
    save_file(adapters.state_dict(), tmp_path / "adapters.safetensors")
    read = load_adapters(tmp_path / "adapters.safetensors", TEACHER, STUDENT).state_dict()
    for name, value in adapters.state_dict().items():
        assert torch.equal(value, read[name]), name


def test_other_shapes_or_names_are_refused_with_what_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "adapters.safetensors"
    swapped = seeded_adapters(STUDENT, TEACHER, 1).state_dict()
    lacking = seeded_adapters(TEACHER, STUDENT, 1).state_dict()
    del lacking["vision.bias"]
    for tensors in (swapped, lacking):
        save_file(tensors, path)
        with pytest.raises(CheckpointError) as caught:
            load_adapters(path, TEACHER, STUDENT)
        assert str(path) in str(caught.value)
        needed = (STUDENT.num_attention_heads, TEACHER.num_attention_heads)
        assert f"these models need {{'attention.weight': {needed}" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "adapters.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapters.safetensors: cannot be read as safetensors"):
        load_adapters(path, TEACHER, STUDENT)
