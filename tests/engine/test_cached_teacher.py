"""An optimizer step with a cached teacher equals the step that runs the teacher, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import cached, tiny
from tests.engine.spy import first_step
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
    settings: dict[str, Any] = {**ALONE, **SETTINGS[name]}
    online = tiny.write_run(tmp_path / "online", 2, teacher__placement="replicated", **settings)
    cache = cached.begin(online, tmp_path / "cache")
    two_ranks.run(cached.write_on, str(cache))
    run = cached.cached_run(tmp_path / "cached", cache, 2, **settings)
    for ours, theirs in zip(*(two_ranks.run(first_step, str(of)) for of in (run, online)), strict=True):
        assert ours["sums"].equal(theirs["sums"])
        assert (theirs["sums"] > 0).all()
        assert theirs["counts"].vision_tokens < 144 * theirs["counts"].samples, "some samples have no image"
        assert ours["norm"] == theirs["norm"]
        assert ours["counts"] == theirs["counts"]
        assert ours["gradients"].keys() == theirs["gradients"].keys()
        for key, gradient in theirs["gradients"].items():
            assert torch.equal(ours["gradients"][key], gradient), key
