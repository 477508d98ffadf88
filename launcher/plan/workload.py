"""The micro-batch that a plan assumes: as long as the configuration allows, with one image per sample."""

from __future__ import annotations

from dataclasses import dataclass, replace

from alignkd.config import Config
from launcher.render.deepspeed import accumulation_steps

IMAGES_PER_SAMPLE = 1  # the training data of MobileVLM V2 has at most one


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Workload:
    """The work of one rank. An upper bound: all samples are ``data.max_length`` long, all text supervised."""

    samples: int  # per micro-batch
    length: int  # embedding tokens per sample
    vision_tokens: int  # per image
    accumulation: int  # micro-batches per optimizer step
    window: int  # micro-batches per teacher forward, whose targets are kept together

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def images(self) -> int:
        return self.samples * IMAGES_PER_SAMPLE

    @property
    def text_rows(self) -> int:
        """Text tokens per sample that attend to the image; in the worst case all of them are supervised."""
        return max(self.length - IMAGES_PER_SAMPLE * self.vision_tokens, 1)

    def with_images_of(self, vision_tokens: int) -> Workload:
        """The same text for a model whose images are ``vision_tokens`` long."""
        more = IMAGES_PER_SAMPLE * (vision_tokens - self.vision_tokens)
        return replace(self, length=self.length + more, vision_tokens=vision_tokens)

    @property
    def supervised(self) -> int:
        return self.samples * self.text_rows


def workload(config: Config, cluster: Cluster, vision_tokens: int) -> Workload:
    """Raises UserError when the global batch cannot be split over the ranks.

    A token budget is assumed to be filled with samples of full length; shorter ones would bring more images.
    The sampler makes micro-batches of similar cost, so none exceeds a rank's share of the global batch.
    """
    training, length = config.training, config.data.max_length
    accumulation, samples = accumulation_steps(training, cluster.ranks), training.micro_batch_size
    if training.tokens_per_micro_batch is not None:
        share = -(-training.global_batch_size // cluster.ranks)
        samples = min(max(training.tokens_per_micro_batch // length, 1), share)
        accumulation = -(-share // samples)
    return Workload(
        samples=samples,
        length=length,
        vision_tokens=vision_tokens,
        accumulation=accumulation,
        window=min(config.teacher.lookahead or accumulation, accumulation),
    )
