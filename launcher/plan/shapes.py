"""What the formulas of a plan need to know of a model, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass

from alignkd.models.configuration import MobileVLMConfig


@dataclass(frozen=True)
class VisionShapes:
    """Of the tower and the projector; counts are those of one image."""

    width: int
    mlp: int
    layers: int  # that run
    patches: int
    seen: int  # positions that a patch attends to, at most
    values: int  # numbers in a preprocessed image
    projected: int  # positions that the projector's matrices are applied to
    projector_values: int  # numbers that the projector keeps for its backward, beside the tower's output


@dataclass(frozen=True)
class ModelShapes:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_width: int
    vision_tokens: int  # of one image
    vision: VisionShapes

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_width

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_width


@dataclass(frozen=True)
class ImageTokens:
    """Vision tokens of one image. ``most`` is None where an image is cut into tiles: only the length of a
    sample limits their number."""

    least: int
    most: int | None
    pixels: int = 1  # that become a token, where an image keeps its size

    @property
    def is_fixed(self) -> bool:
        return self.least == self.most

    def nearest(self, tokens: int) -> int:
        return max(self.least, tokens if self.most is None else min(tokens, self.most))

    def beside(self, tokens: int, student: ImageTokens) -> int:
        """The most tokens that a teacher, whose own these are, makes of an image that has ``tokens`` for the
        student."""
        if student.most is not None and self.most is not None and tokens >= student.most:
            return self.most  # the image may be larger than the student sees it
        return self.nearest(-(-tokens * student.pixels // self.pixels))


def mobilevlm_shapes(config: MobileVLMConfig) -> ModelShapes:
    tower = config.tower_config
    patches = int((tower["image_size"] // tower["patch_size"]) ** 2)
    vision = VisionShapes(
        width=config.mm_hidden_size,
        mlp=tower["intermediate_size"],
        # hidden_states[k] is the output of k layers; -1 is the last one's.
        layers=int(config.mm_vision_select_layer % (tower["num_hidden_layers"] + 1)),
        patches=patches,
        seen=patches + 1,
        values=int(tower["num_channels"] * tower["image_size"] ** 2),
        projected=patches,
        # Both matrices' outputs, and what GELU and pooling read.
        projector_values=config.hidden_size * (3 * patches + config.vision_tokens),
    )
    return ModelShapes(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_width=config.hidden_size // config.num_attention_heads,
        vision_tokens=config.vision_tokens,
        vision=vision,
    )
