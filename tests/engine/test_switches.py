"""Every optimisation alone gives the same step as none of them; and what look-ahead saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.engine.spy import POSITIONS_PER_CHUNK, first_step, keep_nothing_gathered
from tests.ranks import RankPool

OFF: dict[str, Any] = {
    "training__packing": False,
    "teacher__lookahead": 1,
    "distillation__share_vision_tower": False,
    "training__tokens_per_micro_batch": None,
}
BUDGET = 250  # tokens: a sample with an image has about 200, so all but one of these stand alone
# The losses have no switch: off is the plain form, put into the student's step.
FUSED = {"fused head": "fused_logit_losses", "fused attention": "fused_attention_loss"}
SWITCHES: dict[str, dict[str, Any]] = {
    "packing": {"training__packing": True},
    "lookahead": {"teacher__lookahead": None},
    "lookahead of two": {"teacher__lookahead": 2},
    "fused head": {},
    "tower": {"distillation__share_vision_tower": True},
    "fused attention": {},
    # With a budget, a micro-batch size that does not divide the global batch is as good as any.
    "budget": {"training__tokens_per_micro_batch": BUDGET, "training__micro_batch_size": 3},
    "all": {
        "training__packing": True,
        "teacher__lookahead": None,
        "distillation__share_vision_tower": True,
        "training__tokens_per_micro_batch": BUDGET,
    },
}


def step_of(pool: RankPool, run: Path, plain: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    tiny.write_run(run, pool.world_size, training__max_gradient_norm=0.5, **changes)
    keep_nothing_gathered(run)
    results = pool.run(first_step, str(run), plain)
    assert len({result["gathered"] for result in results}) == 1, "every rank gathers the same"
    return results[0]


def assert_same_step(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    torch.testing.assert_close(ours["sums"], theirs["sums"], rtol=1e-5, atol=1e-5)
    assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-5)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, expected in theirs["gradients"].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            ours["gradients"][name], expected, rtol=1e-5, atol=max(1e-5 * scale, 1e-9), msg=name
        )


@pytest.mark.parametrize(
    ("world_size", "stage", "checkpointing"), [(1, 0, False), (2, 1, False), (2, 2, False), (2, 3, True)]
)
def test_each_optimisation_alone_and_all_together_give_the_plain_step(
    request: pytest.FixtureRequest, tmp_path: Path, world_size: int, stage: int, checkpointing: bool
) -> None:
    pool = request.getfixturevalue({1: "one_rank", 2: "two_ranks"}[world_size])
    common = {"student__zero_stage": stage, "training__gradient_checkpointing": checkpointing}
    off = step_of(pool, tmp_path / "off", tuple(FUSED.values()), **common, **OFF)
    assert not off["packed"]
    assert off["tower_runs"] == off["micro_batches"] == 4 // world_size
    assert len(off["head_rows"]) == off["micro_batches"]
    assert max(off["head_rows"]) > POSITIONS_PER_CHUNK
    assert off["sums"].min() > 0
    assert off["counts"].slots > off["counts"].tokens
    for name, changes in SWITCHES.items():
        plain = tuple(fused for switch, fused in FUSED.items() if name not in (switch, "all"))
        on = step_of(pool, tmp_path / name.replace(" ", "-"), plain, **common, **{**OFF, **changes})
        assert_same_step(on, off)
        # Of ours nothing is; transformers' CLIP embeddings read the dtype of their convolution's weight.
        assert set(on["read_outside_their_module"]) <= {"student.vision_tower.embeddings"}
        assert on["packed"] == (name in ("packing", "all"))
        assert (on["micro_batches"] > off["micro_batches"]) == (name in ("budget", "all"))
        assert (max(on["head_rows"]) <= POSITIONS_PER_CHUNK) == (name in ("fused head", "all"))
        assert on["tower_runs"] == (0 if name in ("tower", "all") else on["micro_batches"])
        if on["packed"]:
            assert on["counts"].slots == on["counts"].tokens == off["counts"].tokens
        if (name.startswith("lookahead") and world_size > 1) or (name == "tower" and stage == 3):
            assert on["gathered"] < off["gathered"]


def test_gathered_bytes_do_not_grow_with_accumulation(two_ranks: RankPool, tmp_path: Path) -> None:
    """The teacher's weights and its head once per optimizer step, whatever the number of micro-batches."""
    gathered = {}
    for size, lookahead in ((4, None), (2, None), (1, None), (1, 1)):
        result = step_of(
            two_ranks,
            tmp_path / f"{size}-{lookahead}",
            training__micro_batch_size=size,
            teacher__lookahead=lookahead,
        )
        gathered[result["micro_batches"], lookahead] = result["gathered"]
    assert gathered[1, None] == gathered[2, None] == gathered[4, None] > 0
    assert gathered[4, 1] > 2.5 * gathered[4, None], "the counter sees the forwards of each micro-batch"
