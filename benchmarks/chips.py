"""What a step computes, and what a chip can: the share of its peak that a step reaches.

``python -m benchmarks.chips`` prints which share of the floor's operations a step from a cache of the teacher
still computes.
"""

from __future__ import annotations

import torch

from alignkd.data.batch import Batch
from benchmarks.batches import Shape, random_window
from benchmarks.models import PAIRS, VOCABULARY, Decoder, Pair
from benchmarks.report import table

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
    teacher = _decoder_flops(pair.teacher, samples, length) + _teacher_head_flops(pair, batch)
    student = _decoder_flops(pair.student, samples, length) + 2 * positions * pair.student.width * VOCABULARY
    tower = pair.tower
    patches = (tower["image_size"] // tower["patch_size"]) ** 2 + 1
    layer = 4 * tower["hidden_size"] ** 2 + 2 * tower["hidden_size"] * tower["intermediate_size"]
    per_image = 2 * patches * layer + 4 * patches**2 * tower["hidden_size"]
    vision = batch.image_count * (tower["num_hidden_layers"] - 1) * per_image
    return float(teacher + 3 * student + vision)


def cached_share(pair: Pair, batch: Batch, head: bool) -> float:
    """What is left of the floor's operations without the teacher's layers and, unless ``head``, its head."""
    saved = _decoder_flops(pair.teacher, *batch.input_ids_BL.shape)
    return 1 - (saved + (0 if head else _teacher_head_flops(pair, batch))) / step_flops(pair, batch)


def _teacher_head_flops(pair: Pair, batch: Batch) -> float:
    return 2.0 * len(batch.logit_positions_N) * pair.teacher.width * VOCABULARY


def _decoder_flops(decoder: Decoder, samples: int, length: int) -> float:
    """Forward: matrix products, and half of the attention scores and values (causal)."""
    weights = 4 * decoder.width**2 + 3 * decoder.width * decoder.feed_forward
    per_layer = 2 * length * weights + 2 * length**2 * decoder.width
    return float(samples * decoder.layers * per_layer)


def main() -> None:
    rows = []
    for pair in PAIRS.values():
        for length in (1200, 2048):
            shape = Shape(f"{length} x 1", (length,))
            (batch,) = random_window(shape, packing=False, token_budget=False, device=torch.device("cpu"))
            shares = [cached_share(pair, batch, head) for head in (True, False)]
            rows.append([pair.name, shape.name, *(f"{share:.2f}" for share in shares)])
    print(table(["pair", "L x samples", "exact", "top_k"], rows))


if __name__ == "__main__":
    main()
