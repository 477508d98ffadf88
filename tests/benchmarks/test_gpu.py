"""The parts of the GPU check, each on a CPU with tiny shapes."""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.models import attention
from benchmarks.gpu import head, repeat, waits
from benchmarks.gpu.parts import PARTS, part_command, run_part
from benchmarks.gpu.rows import Row, shown, table
from benchmarks.gpu.sizes import full_sizes, tiny_sizes
from benchmarks.setting import Setting
from tests.models.test_packing import masked_attention

TINY = tiny_sizes()


def rows_of(part: str) -> list[Row]:
    rows = list(importlib.import_module(f"benchmarks.gpu.{part}").measure(TINY))
    json.dumps(rows)  # as they are stored
    assert len({row["what"] for row in rows}) == len(rows)
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
        assert "error" not in row or isinstance(row["error"], float), row
    return rows


def test_ceilings_are_rates_and_first_calls() -> None:
    rows = rows_of("ceilings")
    assert [row.get("unit") for row in rows] == ["TFLOP/s", "GB/s", *[None, "ms", "ms"] * 2]
    assert all(row["value"] > 0 for row in rows if "unit" in row)
    assert all("attention" in row["value"] for row in rows if "unit" not in row)
    assert rows[4]["value"] >= rows[3]["value"]  # all, and the median


def test_a_step_is_measured_against_its_floor() -> None:
    rows = rows_of("steps")
    ways = ["floor", "ours", "ours, loop", "floor, cuDNN", "ours, loop, cuDNN"]
    assert [row["what"] for row in rows] == [f"{shape.name}, {way}" for shape in TINY.shapes for way in ways]
    for floor, *others in (rows[:5], rows[5:]):
        assert floor["x floor"] == 1.0
        for row in others:
            assert row["x floor"] == row["ms"] / floor["ms"]
            if "ours" in row["what"]:  # the alignment terms take kernels, and keep blocks
                assert row["kernels"] > floor["kernels"]
                assert row["kept MiB"] > floor["kept MiB"] > 0


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The variable-length kernel, as a mask that any device takes; its calls are counted."""
    calls: list[int] = []

    def counted(*arguments: Any, **named: Any) -> torch.Tensor:
        calls.append(1)
        return masked_attention(*arguments, **named)

    monkeypatch.setattr(attention, "has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", counted)
    return calls


def test_packed_samples_are_attended_to_in_three_ways(kernel_calls: list[int]) -> None:
    rows = rows_of("attention")
    assert [row["what"].split(", ", 2)[2] for row in rows] == ["variable length", "loop", "loop with cuDNN"]
    for row in rows:
        assert row["error of the output"] < 1e-6
        assert row["largest of the gradients"] < 1e-5
    assert rows[0]["kernels"] < rows[1]["kernels"] == rows[2]["kernels"]
    assert len(kernel_calls) == 1 + 3 + 1  # errors, times, kernels: of the first way alone


def test_a_kernel_that_mixes_samples_is_an_error(
    kernel_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixing(query_LHE: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        return masked_attention(query_LHE.flip(0), *arguments, **named)

    monkeypatch.setattr(attention, "varlen_attn", mixing)
    errors = [row["error of the output"] for row in rows_of("attention")]
    assert errors[0] > 0.1 > 1e-6 > errors[1]


def test_one_graph_serves_all_packings_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", traceable)
    rows = {tuple(row["what"].replace(" tokens", "").split(", ")): row for row in rows_of("layers")}
    after = f"after {TINY.packings}"
    for side in ("teacher", "student"):
        key = (side, "2 layers", str(TINY.packed_tokens[0]))
        compiled = rows[*key, "variable length", "compiled"]
        assert compiled["graphs after 1 packing"] == compiled[after] > 0
        assert rows[*key, "variable length", "eager"][after] == 0
        looped = rows[*key, "loop", "compiled"]
        assert looped[after] == TINY.packings * looped["graphs after 1 packing"]


def traceable(
    query_LHE: torch.Tensor,
    key_LHE: torch.Tensor,
    value_LHE: torch.Tensor,
    bounds: torch.Tensor,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """Not what the kernel computes, but no more dependent on values."""
    return (query_LHE + key_LHE) * value_LHE * bounds.sum()


def test_a_way_that_cannot_be_compiled_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    rows = list(importlib.import_module("benchmarks.gpu.layers").measure(TINY))
    assert len(rows) == 8
    assert [row.get("error") for row in rows[:4]] == [None] * 4
    assert {row["error"] for row in rows[4:]} == {"RuntimeError: no compiler here"}


def test_the_head_by_chunks_and_ways_to_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU has no product with another output type.
    monkeypatch.setitem(head.WAYS, "fp32 product, then added", lambda total, a, b: total.add_(a.float() @ b))
    rows = rows_of("head")
    assert [row["what"].split(", ", 2)[0] for row in rows] == ["whole head"] * 2 + ["weight's gradient"] * 6
    for row in rows[2:]:
        assert row["error"] < 1e-6 if "added within" not in row["what"] else "note" in row
    assert all(row["ms"] > 0 for row in rows if "note" not in row)


def test_a_step_repeats_itself_bit_for_bit_on_a_cpu() -> None:
    rows = rows_of("repeat")
    assert len(rows) == 6
    for row in rows:
        assert row["bitwise equal"]
        assert row["of"] > 20
        assert row["losses that differ"] == row["gradients that differ"] == row["largest difference"] == 0
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_step_that_does_not_repeat_itself_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(setting: Setting, window: Any) -> Any:
        sums = usual(setting, window)
        parameter = next(p for p in setting.module.parameters() if p.grad is not None)
        parameter.grad.mul_(1 + 1e-3 * torch.rand(()))  # type: ignore[union-attr]
        return sums

    usual = repeat.ours
    monkeypatch.setattr(repeat, "ours", noisy)
    row = rows_of("repeat")[0]
    assert (row["bitwise equal"], row["losses that differ"], row["gradients that differ"]) == (False, 0, 1)
    assert 0 < row["largest difference"] < 2e-3


def test_the_throughput_timer_of_an_engine_is_seen_to_synchronise(tmp_path: Path) -> None:
    part = next(part for part in PARTS if part.name == "waits")
    outcome = run_part(part, part_command(part, tiny=True), 300, tmp_path)
    assert outcome.status == "done", outcome.log
    assert [row["synchronize()"] for row in outcome.rows] == [0, 2, 0]
    assert outcome.command == "python -m benchmarks.gpu.part waits --tiny"


def test_waits_are_counted_by_their_line() -> None:
    def step() -> None:
        torch.cuda.synchronize()
        waits.get_accelerator().synchronize()
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    line = step.__code__.co_firstlineno + 4
    assert waits.count_waits(step) == Counter({"synchronize": 2, f"benchmarks/test_gpu.py:{line}": 2})


def test_tables_have_the_columns_of_all_rows() -> None:
    rows: list[Row] = [{"what": "a", "ms": 1234.5}, {"what": "b", "error": "x|y\nz", "ms": 0.01234}]
    assert table(rows).splitlines()[2:] == ["| a | 1,234 |  |", "| b | 0.0123 | x\\|y z |"]
    assert [shown(value) for value in (None, True, False, 12345)] == ["", "yes", "no", "12,345"]


def test_the_shapes_for_a_gpu_are_possible() -> None:
    sizes = full_sizes()
    assert (sizes.shallow.teacher.width, sizes.shallow.student.layers) == (4096, 4)
    for shape in sizes.shapes:
        assert list(shape.lengths) == sorted(shape.lengths)
        assert max(shape.lengths) <= 4096
        assert min(shape.lengths) > 36 + 144
    assert [len(shape.lengths) for shape in sizes.shapes] == [4, 16]
