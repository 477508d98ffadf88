"""The parts of the GPU check, each on a CPU with tiny shapes."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from benchmarks.gpu import head, packed, repeat, waits
from benchmarks.gpu.attention import Layer
from benchmarks.gpu.parts import PARTS, part_command, run_part
from benchmarks.gpu.rows import Row, shown, table
from benchmarks.gpu.sizes import full_sizes, tiny_sizes
from benchmarks.setting import Setting

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
    ways = ["floor, cuDNN attention off", "ours, cuDNN attention off", "ours, cuDNN attention on"]
    assert [row["what"] for row in rows] == [f"{shape.name}, {way}" for shape in TINY.shapes for way in ways]
    for floor, *others in (rows[:3], rows[3:]):
        assert floor["x floor"] == 1.0
        for row in others:
            assert row["x floor"] == row["ms"] / floor["ms"]
            # The alignment terms take kernels, and blocks that are kept.
            assert row["kernels"] > floor["kernels"]
            assert row["kept MiB"] > floor["kept MiB"] > 0


def test_both_ways_to_attend_within_packed_samples_are_exact() -> None:
    rows = rows_of("attention")
    ways = ["variable length", "loop, cuDNN off", "loop, cuDNN on"]
    assert [row["what"].split(", ", 2)[2] for row in rows] == ways
    for row in rows:
        assert row["error of the output"] < 1e-6
        assert row["largest of the gradients"] < 1e-5
    assert rows[0]["kernels"] < rows[1]["kernels"]


def test_a_mask_that_crosses_samples_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed.Packing, "arguments", _arguments_of_one_sample)
    rows = rows_of("attention")
    assert rows[0]["error of the output"] > 0.1


def _arguments_of_one_sample(packing: packed.Packing, name: str) -> dict[str, Any]:
    if name == packed.LOOP:
        return {"segments": packing.segments}
    return {"starts": packing.starts[[0, -1]], "longest": int(packing.starts[-1])}


def test_the_kernel_is_given_what_the_loop_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    packing = packed.random_packing(90, TINY, seed=1)
    query, key, value = (torch.randn(1, 90, 4, 16).transpose(1, 2) for _ in range(3))
    loop = AttentionInterface()[packed.LOOP]
    attend = partial(loop, Layer(), attention_mask=None, scaling=0.3)
    expected, _ = attend(query, key, value, segments=packing.segments)

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor, max_q: int, max_k: int,
        *, scale: float, window_size: tuple[int, int],
    ) -> torch.Tensor:  # fmt: skip
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max(packing.segments) <= max_q == max_k
        assert window_size == (-1, 0)  # causal
        bounds = cu_seq_k.tolist()
        assert bounds == cu_seq_q.tolist()
        parts = [slice(begin, end) for begin, end in itertools.pairwise(bounds)]
        outputs = [
            loop(Layer(), *(x[part].transpose(0, 1)[None] for x in (q, k, v)), None, scaling=scale)[0][0]
            for part in parts
        ]
        return torch.cat(outputs)

    monkeypatch.setattr(packed, "has_kernel", lambda _: True)
    monkeypatch.setattr(packed.varlen, "varlen_attn", kernel)
    found, _ = packed.variable_length(
        Layer(), query, key, value, None, scaling=0.3, **packing.arguments(packed.VARIABLE)
    )
    torch.testing.assert_close(found, expected)


def test_one_graph_serves_all_packings_with_variable_lengths() -> None:
    rows = {row["what"].split(" tokens, ")[1] + row["what"].split(",")[0]: row for row in rows_of("layers")}
    after = f"after {TINY.packings}"
    for side in ("teacher", "student"):
        compiled = rows[f"variable length, compiled{side}"]
        assert compiled["graphs after 1 packing"] == compiled[after] > 0
        assert rows[f"variable length, eager{side}"][after] == 0
        looped = rows[f"loop, compiled{side}"]
        assert looped[after] == TINY.packings * looped["graphs after 1 packing"]


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
    assert len(rows) == 4
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
