"""A whole run of tiny models beside the floor's steps: the same samples, and every second accounted for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from alignkd.data.index_cache import CACHE_VARIABLE
from alignkd.data.index_file import read_index
from alignkd.distributed.ranks import Ranks
from alignkd.run_folder.paths import RunPaths
from benchmarks.gpu.sizes import TINY_PAIR
from benchmarks.whole import __main__ as program
from benchmarks.whole import floor, parts
from benchmarks.whole.inputs import write_configuration, write_models
from benchmarks.whole.parts import FloorRun, Measured, ProductRun
from tests.ranks import RankPool

LENGTH, SAMPLES, STEPS = 256, 2, 4


class Both(NamedTuple):
    run: Path
    ours: ProductRun
    floor: FloorRun


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder / "cache"))
        write_models(folder / "models", TINY_PAIR)
        config = write_configuration(folder / "run", folder / "models", LENGTH, SAMPLES, 1, STEPS)
        run, whole = program.launch(config, "tiny", 1, ["student.zero_stage=1"])
    return Both(run, parts.read_run(run, whole), floor.measure(run, 0, 1))


def test_the_floor_trains_on_the_samples_and_weights_of_the_run(both: Both) -> None:
    program.check(both.ours, both.floor)
    other = dataclasses.replace(both.floor, cross_entropy=1.001 * both.floor.cross_entropy)
    with pytest.raises(SystemExit, match="do not train on the same"):
        program.check(both.ours, other)
    assert len(both.ours.steps) == len(both.floor.steps) == STEPS


def test_samples_have_the_length_that_was_asked_for(both: Both) -> None:
    stored = read_index(RunPaths(both.run).index)
    assert stored is not None
    assert set(stored.index.length.tolist()) == {LENGTH}
    assert len(stored.index) == STEPS * SAMPLES
    (window, *_) = floor._windows(both.run, 0, 1)
    (batch,) = window
    after_image = LENGTH - 144
    assert batch.counts.logits == pytest.approx(SAMPLES * after_image / 2, rel=0.1)
    assert not batch.segments  # the floor pads, and has nothing to pad here


def test_the_settings_reach_the_run(both: Both) -> None:
    values = json.loads(RunPaths(both.run).student_deepspeed.read_text())
    assert values["zero_optimization"]["stage"] == 1


def test_all_seconds_of_a_run_belong_to_a_part(both: Both) -> None:
    result = json.loads(RunPaths(both.run).result.read_text())
    assert result["status"] == "done"
    assert result["saves"]["committed"] == 2
    ours = both.ours
    for step in ours.steps:
        assert set(step) == set(parts.PARTS)
        assert min(step.values()) >= 0
    in_steps = sum(sum(step.values()) for step in ours.steps)
    assert ours.whole == pytest.approx(ours.start_up + in_steps + 2 * ours.save + ours.export)
    assert min(ours.start_up, ours.save, ours.export) > 0
    for step in both.floor.steps:
        assert set(step) == {"teacher", "student", "optimizer"}
        assert min(step.values()) > 0


def added_up(ranks: Ranks) -> list[list[float]]:
    used, unused = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    other = torch.nn.Parameter(torch.zeros(3))
    used.grad = torch.full((2, 2), 1.0 + ranks.rank)
    other.grad = torch.arange(3.0) * (1 + 2 * ranks.rank)
    floor._add_up([used, unused, other], ranks.world_size)
    assert unused.grad is None
    return [used.grad.flatten().tolist(), other.grad.tolist()]


def test_ranks_of_the_floor_average_their_gradients(two_ranks: RankPool) -> None:
    assert two_ranks.run(added_up) == [[[1.5] * 4, [0.0, 2.0, 4.0]]] * 2


def run_of(*seconds: float) -> ProductRun:
    steps = [dict.fromkeys(parts.PARTS, second / len(parts.PARTS)) for second in seconds]
    return ProductRun(steps, 7.0, start_up=20.0, save=50.0, export=2.0, whole=90.0)


def floor_of(*seconds: float) -> FloorRun:
    return FloorRun([{"teacher": second / 2, "student": second / 2} for second in seconds], 7.0)


def test_tables_compare_pairs_of_runs_without_their_first_steps() -> None:
    result = Measured(
        400, 1, 2, [floor_of(9, 1, 1), floor_of(9, 2, 2)], [run_of(99, 1.2, 1.2), run_of(99, 2.2, 2.2)]
    )
    assert result.ratio == pytest.approx((1.2 + 1.1) / 2)
    head, (row,) = parts.whole_table([result])
    found = dict(zip(head, row, strict=True))
    assert (found["L x samples"], found["ranks"], found["x floor"], found["steps"]) == (
        "400 x 1",
        "2",
        "1.15",
        "3",
    )
    # 50 s per 500 steps of 1.5 s
    assert found["with a save every 500"] == "1.22"
    head, rows = parts.part_table([result])
    assert [row[2] for row in rows] == list(parts.WORDS.values())
    above = [float(row[-1].rstrip("%")) for row in rows]
    assert sum(above) == pytest.approx(13.3, abs=0.3)  # of 1.5 s: (1.7 - 1.5) / 1.5
    assert rows[3][3] == "0.000"  # the floor does not wait for data


def test_what_was_measured_is_published_shape_by_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published: list[tuple[str, int]] = []
    monkeypatch.setattr(program, "write_models", lambda folder, pair: None)
    monkeypatch.setattr(
        program.report, "publish", lambda name, _, text, found: published.append((text, len(found)))
    )

    def measure(result: Measured, folder: Path, options: object) -> None:
        result.floors.append(floor_of(1, 1))
        result.runs.append(run_of(1, 1))

    monkeypatch.setattr(program, "_measure", measure)
    monkeypatch.setenv(CACHE_VARIABLE, "")
    program.main(["--lengths", "400", "1200", "--samples", "1", "4", "--ranks", "1", "2", "--publish"])
    # 1200 x 4 has more tokens than --longest.
    assert [count for _, count in published] == [1, 2, 3, 4, 5, 6]
    assert "| 400 x 4 | 2 |" in published[-1][0]
    assert "| 1200 x 4 |" not in published[-1][0]
    assert "By part:" in capsys.readouterr().out
