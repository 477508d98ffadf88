"""Which questions a model answers exactly, without generating.

Greedy generation gives the expected answer exactly when, with that answer as its input, every token of it is
the most likely one. So one forward of question and answer decides (tested against generation).
"""

from __future__ import annotations

import torch

from alignkd.models.families.mobilevlm import MobileVLM
from benchmarks.evidence.loop import Examples

BATCH = 100


@torch.no_grad()
def right_answers(model: MobileVLM, examples: Examples) -> list[bool]:
    """Of each sample, in order."""
    was_training = model.training
    model.eval()
    found: list[bool] = []
    for start in range(0, len(examples.samples), BATCH):
        numbers = range(start, min(start + BATCH, len(examples.samples)))
        batch = examples.batch(numbers)
        hidden_BLD = model(batch).hidden_BLD
        positions_N = batch.logit_positions_N
        chosen_N = model.logits(hidden_BLD.flatten(0, 1)[positions_N]).argmax(dim=-1)
        rows_N = positions_N // hidden_BLD.shape[1]
        wrong_N = chosen_N != batch.logit_labels_N
        wrong = torch.zeros(len(numbers), dtype=torch.long).index_add_(0, rows_N, wrong_N.long())
        found += (wrong == 0).tolist()
    model.train(was_training)
    return found
