"""An optimizer step with a cached teacher equals the step that runs the teacher: bit for bit in the exact
form, and except for the divergence in fp8 and top_k."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.losses.total import TERMS
from alignkd.models.configuration import read_model_config
from tests import cached, tiny
from tests.engine.spy import first_step
from tests.engine.test_training_run import same_but_for_times, train_run
from tests.ranks import RankPool

# A sample's hidden states are cached from a forward of its own. Other forwards round differently, as they do
# without a cache when micro-batches are split in another way.
ALONE = {"training__micro_batch_size": 1, "teacher__lookahead": 1}
SETTINGS = {
    "fp32, packed": {"training__precision": "fp32", "training__packing": True},
    "fp32, padded": {"training__precision": "fp32", "training__packing": False},
    "bf16, packed": {"training__precision": "bf16", "training__packing": True},
    "bf16, padded": {
        "training__precision": "bf16",
        "training__packing": False,
        "distillation__logit_positions": "all_text",
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_term_and_gradient_is_that_of_the_uncached_step(
    two_ranks: RankPool, tmp_path: Path, name: str
) -> None:
    for ours, theirs in steps_with_and_without(two_ranks, tmp_path, SETTINGS[name], "exact"):
        assert ours["sums"].equal(theirs["sums"])
        assert (theirs["sums"] > 0).all()
        assert theirs["counts"].vision_tokens < 144 * theirs["counts"].samples, "some samples have no image"
        assert ours["norm"] == theirs["norm"]
        assert ours["counts"] == theirs["counts"]
        assert ours["gradients"].keys() == theirs["gradients"].keys()
        for key, gradient in theirs["gradients"].items():
            assert torch.equal(ours["gradients"][key], gradient), key


def steps_with_and_without(
    ranks: RankPool, folder: Path, settings: dict[str, Any], form: str
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The first step of each rank with a cache, and the one that runs the teacher."""
    settings = {**ALONE, **settings, "teacher__cache_form": form}
    online = tiny.write_run(folder / "online", 2, teacher__placement="replicated", **settings)
    cache = cached.begin(online, folder / "cache")
    ranks.run(cached.write_on, str(cache))
    run = cached.cached_run(folder / "cached", cache, 2, **settings)
    return zip(*(ranks.run(first_step, str(of)) for of in (run, online)), strict=True)


def test_a_cache_in_fp8_changes_the_divergence_a_little_and_no_other_term(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    for ours, theirs in steps_with_and_without(two_ranks, tmp_path, SETTINGS["bf16, packed"], "fp8"):
        assert ours["counts"] == theirs["counts"]
        for term, our, their in zip(TERMS, ours["sums"].tolist(), theirs["sums"].tolist(), strict=True):
            if term != "divergence":
                assert our == their
                continue
            assert our != their
            assert our == pytest.approx(their, rel=0.002)
        our, their = (
            torch.cat([gradient.flatten().double() for gradient in step["gradients"].values()])
            for step in (ours, theirs)
        )
        assert not our.equal(their)
        assert torch.cosine_similarity(our, their, dim=0) > 0.9999


TOKENS = {
    "distillation__divergence": "forward_kl",
    "distillation__temperature": 2.0,
    "training__precision": "fp32",
    "teacher__cache_form": "top_k",
}


def test_a_run_that_reads_tokens_is_near_the_one_that_runs_the_teacher_and_can_resume(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """All tokens but one: then the rest is that token, and what differs is how log-probabilities are rounded.
    The teacher's forward serves two micro-batches, whose tokens are joined and split."""
    vocabulary = read_model_config(tiny.TEACHER).vocab_size
    settings: dict[str, Any] = {
        **TOKENS,
        "teacher__cache_top_k": vocabulary - 1,
        "training__max_steps": 3,
        "training__micro_batch_size": 1,
        "teacher__lookahead": 2,
    }
    online = tiny.write_run(tmp_path / "online", 2, teacher__placement="replicated", **settings)
    cache = cached.begin(online, tmp_path / "cache")
    two_ranks.run(cached.write_on, str(cache))
    run = cached.cached_run(tmp_path / "cached", cache, 2, **settings)
    assert two_ranks.run(train_run, str(run)) == two_ranks.run(train_run, str(online)) == [0, 0]
    ours, theirs = tiny.metrics_rows(run), tiny.metrics_rows(online)
    assert len(ours) == len(theirs) == 3
    for step, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        for term in ("ce", "forward_kl", "attention", "vision_all", "vision_focus", "gradient_norm", "loss"):
            # AdamW's first steps can turn the rounding of tiny gradients into whole updates.
            assert mine[term] == pytest.approx(expected[term], rel=1e-2 if step else 5e-4), term
    assert theirs[0]["forward_kl"] > 0.01
    stopped = tmp_path / "stopped"
    tiny.copy_untrained(run, stopped)
    assert two_ranks.run(train_run, str(stopped), 2) == [85, 85]
    assert two_ranks.run(train_run, str(stopped)) == [0, 0]
    same_but_for_times(stopped, run)


@pytest.mark.parametrize(
    "changes",
    [
        {"training__precision": "fp32"},
        {
            "training__precision": "bf16",
            "training__packing": True,
            "student__zero_stage": 3,
            "distillation__balance": "learned",
        },
    ],
    ids=["fp32", "bf16, packed, ZeRO-3, learned balance"],
)
def test_with_fewer_tokens_the_divergence_is_smaller_and_nothing_else_differs(
    two_ranks: RankPool, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = TOKENS | {"teacher__cache_top_k": 16} | changes
    for ours, theirs in steps_with_and_without(two_ranks, tmp_path, settings, "top_k"):
        divergence = TERMS.index("divergence")
        for term, (mine, expected) in enumerate(zip(ours["sums"], theirs["sums"], strict=True)):
            assert 0 < mine < expected if term == divergence else mine == expected
        adapters = [name for name in theirs["gradients"] if name.startswith("adapters.")]
        assert len(adapters) == 4
        for name in adapters:  # the divergence does not reach them
            assert ours["gradients"][name].equal(theirs["gradients"][name])
