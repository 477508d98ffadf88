"""What one micro-batch is taken to be: as long as the configuration allows, with one image a sample."""

from __future__ import annotations

from dataclasses import dataclass

from alignkd.config import Config
from launcher.render.deepspeed import accumulation_steps

IMAGES_PER_SAMPLE = 1  # the training data of MobileVLM V2 have at most one


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Workload:
    """Of one rank. An upper bound: all samples as long as ``data.max_length``, all text supervised."""

    samples: int  # of a micro-batch
    length: int  # embedding tokens of a sample
    vision_tokens: int  # of an image
    accumulation: int  # micro-batches per optimizer step
    window: int  # micro-batches that one teacher forward serves, and whose targets are kept together

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def images(self) -> int:
        return self.samples * IMAGES_PER_SAMPLE

    @property
    def text_rows(self) -> int:
        """Text tokens that see the image, of a sample; all of them are supervised in the worst case."""
        return max(self.length - IMAGES_PER_SAMPLE * self.vision_tokens, 1)

    @property
    def supervised(self) -> int:
        return self.samples * self.text_rows


def workload(config: Config, cluster: Cluster, vision_tokens: int) -> Workload:
    """Raises UserError when the global batch cannot be split over the ranks.

    A token budget is taken to be filled with samples of full length; shorter ones bring more images. The
    sampler makes its micro-batches of similar cost, so none is more than a rank's share of the global batch.
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
