"""Section ``teacher``: where the frozen teacher's weights or its cached answers are."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignkd.config.section import PathText, PositiveInt, Section


class TeacherSection(Section):
    placement: Literal["zero3", "zero3_node", "zero3_offload", "replicated", "cached"] = Field(
        "zero3",
        description="where the weights are kept: sharded over all ranks, sharded over the ranks of each node "
        "(gathers stay within it), sharded over all ranks in host memory, or replicated on every rank; "
        "`cached` reads its outputs from teacher.cache and holds only the parts that the other terms need",
    )
    cache: PathText | None = Field(
        None, description="folder of the teacher's cache, which `alignkd cache` writes"
    )
    cache_form: Literal["exact", "fp8", "top_k"] = Field(
        "exact",
        description="what the cache stores: hidden states as they are, or rounded to 8 bits, which halves a "
        "bf16 cache and changes the losses a little; or, instead, the teacher's most likely tokens, a small "
        "fraction of the size, for distillation.divergence = forward_kl only (docs/cache.md)",
    )
    cache_top_k: int = Field(
        64, ge=1, le=1024, description="how many tokens `top_k` stores for a position; 16 to 128 as a rule"
    )
    lookahead: PositiveInt | None = Field(
        None,
        description="micro-batches served by one teacher forward pass; default: all of an optimizer step",
    )
    keep_head: bool = Field(
        True,
        description="keep the head of a sharded teacher between optimizer steps; false gathers it in each "
        "step and frees its memory while the optimizer works",
    )
    precision: Literal["bf16", "fp16", "fp32"] | None = Field(None, description="default: training.precision")

    @property
    def caches_top_k(self) -> bool:
        """Whether a run reads the teacher's top-k tokens, so that it needs neither head nor hidden states."""
        return self.placement == "cached" and self.cache_form == "top_k"
