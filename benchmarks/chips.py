"""What a step computes, and what a chip can: the share of its peak that a step reaches."""

from __future__ import annotations

from alignkd.data.batch import Batch
from benchmarks.models import VOCABULARY, Decoder, Pair

# Dense bf16 peak in FLOP/s, by the makers' data sheets; the longest name that fits counts.
PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A10": 125e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def bf16_peak(device_name: str) -> float | None:
    """None for a chip that is not in the list."""
    words = set(device_name.replace("-", " ").split())
    fitting = [name for name in PEAKS if set(name.split()) <= words]
    return PEAKS[max(fitting, key=len)] if fitting else None


def step_flops(pair: Pair, batch: Batch) -> float:
    """Of the floor: teacher forward, student forward and backward (twice a forward), heads at the supervised
    positions, one tower. Recomputation is no progress and is not counted."""
    samples, length = batch.input_ids_BL.shape
    positions = len(batch.logit_positions_N)
    teacher = _decoder_flops(pair.teacher, samples, length) + 2 * positions * pair.teacher.width * VOCABULARY
    student = _decoder_flops(pair.student, samples, length) + 2 * positions * pair.student.width * VOCABULARY
    tower = pair.tower
    patches = (tower["image_size"] // tower["patch_size"]) ** 2 + 1
    layer = 4 * tower["hidden_size"] ** 2 + 2 * tower["hidden_size"] * tower["intermediate_size"]
    per_image = 2 * patches * layer + 4 * patches**2 * tower["hidden_size"]
    vision = batch.image_count * (tower["num_hidden_layers"] - 1) * per_image
    return float(teacher + 3 * student + vision)


def _decoder_flops(decoder: Decoder, samples: int, length: int) -> float:
    """Forward: matrix products, and half of the attention scores and values (causal)."""
    weights = 4 * decoder.width**2 + 3 * decoder.width * decoder.feed_forward
    per_layer = 2 * length * weights + 2 * length**2 * decoder.width
    return float(samples * decoder.layers * per_layer)
