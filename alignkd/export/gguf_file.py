"""Write one GGUF file, a tensor at a time: memory holds the largest tensor, not the model.

Format: the ``gguf`` package (llama.cpp, ``gguf-py``), which also quantises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch

from alignkd.errors import CheckpointError

StoredType = Literal["f32", "f16", "q8_0", "q4_0"]
Array = np.ndarray[Any, Any]
Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]

QUANTIZED = ("q8_0", "q4_0")
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
NUMPY_TYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}
BYTES: np.dtype[Any] = np.dtype(np.uint8)  # of whole quantised blocks
LARGEST_F16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor to write. ``read`` gives its values, of any floating dtype, in ``shape``.

    ``stored`` is what is asked for: rows that do not fill whole blocks of 32 are stored as f16 instead.
    """

    name: str
    shape: tuple[int, ...]
    stored: StoredType
    read: Callable[[], torch.Tensor]

    @property
    def type(self) -> StoredType:
        block, _ = gguf.GGML_QUANT_SIZES[TYPES[self.stored]]
        return "f16" if self.shape[-1] % block else self.stored

    def values(self) -> Array:
        """The tensor as it is written. Raises CheckpointError for values that f16 cannot hold."""
        values: Array = self.read().to(torch.float32).numpy()
        assert values.shape == self.shape, f"{self.name}: {values.shape}, announced as {self.shape}"
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= LARGEST_F16:  # also the scales of quantised blocks are f16; NaN compares false
            raise CheckpointError(f"{self.name}: holds {largest}; 16-bit floats end at {LARGEST_F16:.0f}")
        stored: Array = gguf.quants.quantize(values, TYPES[self.type])
        return stored


def write_gguf_file(
    path: Path, architecture: str, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]
) -> None:
    """Write ``path``. ``metadata``: integers become uint32, floats float32; a list has one type.

    Raises OSError.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in tensors:
        shape, dtype = tensor.shape, NUMPY_TYPES.get(tensor.type, BYTES)
        if tensor.type in QUANTIZED:
            shape = gguf.quant_shape_to_byte_shape(shape, TYPES[tensor.type])
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, shape, dtype, size, TYPES[tensor.type])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(np.ascontiguousarray(tensor.values()))
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))
