"""Which samples an evaluation sees."""

from __future__ import annotations

import pytest

from alignkd.config.schema import (
    Config,
    DataSection,
    DataSource,
    EvaluationSection,
    ModelSection,
    TrainingSection,
)
from alignkd.data.encoder import MobileVLMEncoder
from alignkd.data.held_out import held_out_data, held_out_loader
from alignkd.data.index import build_index
from tests.data.records import entry


@pytest.mark.parametrize("weight", [0.01, 0.5, 2.0])
def test_each_held_out_sample_is_evaluated_once_whatever_the_weight_of_its_source(
    weight: float, tokenizer, processor, write_json
) -> None:
    source = DataSource(file=write_json([entry(f"what {number}?", "a circle") for number in range(10)]))
    weighted = source.model_copy(update={"weight": weight})
    config = Config(
        model=ModelSection(student="x"),
        data=DataSection(sources=[source], workers=0),
        training=TrainingSection(global_batch_size=8, micro_batch_size=2),
        evaluation=EvaluationSection(every=1, sources=[weighted], samples=100),
    )
    encoder = MobileVLMEncoder(tokenizer, 4, processor)
    index = build_index(held_out_data(config), encoder)
    assert index.weights == (1.0,)
    samples = []  # of each window
    for rank in range(2):
        with held_out_loader(config, index, encoder, rank, 2, 2) as loader:
            samples.append([sum(batch.counts.samples for batch in window) for window in loader])
    assert samples == [[4, 2], [4, 0]]


def test_runs_with_other_seeds_are_evaluated_on_the_same_samples(tokenizer, processor, write_json) -> None:
    source = DataSource(file=write_json([entry(f"what {number}?", "a circle") for number in range(10)]))
    encoder, seen = MobileVLMEncoder(tokenizer, 4, processor), []
    for seed in (1, 2):
        config = Config(
            model=ModelSection(student="x"),
            data=DataSection(sources=[source], workers=0),
            training=TrainingSection(global_batch_size=8, micro_batch_size=2, seed=seed),
            evaluation=EvaluationSection(every=1, sources=[source], samples=4),
        )
        index = build_index(held_out_data(config), encoder)
        with held_out_loader(config, index, encoder, 0, 1, 2) as loader:
            seen.append([batch.input_ids_BL.tolist() for window in loader for batch in window])
    assert len(seen[0]) == 2
    assert seen[0] == seen[1]
