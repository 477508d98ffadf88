"""What a processor makes of images, for the vision tower: tensors by name, all images one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def joined_inputs(given: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors of several samples as one, joined in dimension 0; the other dimensions are filled up with
    zeros to the largest. This is what the processors do with a batch of their own."""
    names = given[0].keys()
    assert all(inputs.keys() == names for inputs in given), "one processor made all of them"
    return {name: _joined([inputs[name] for inputs in given]) for name in names}


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    shapes = {tensor.shape[1:] for tensor in tensors}
    if len(shapes) == 1:
        return torch.cat(list(tensors))
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    joined = tensors[0].new_zeros((sum(map(len, tensors)), *largest))
    start = 0
    for tensor in tensors:
        place = (slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))
        joined[place] = tensor
        start += len(tensor)
    return joined
