"""The two model files of a GGUF export. Without torch."""

from __future__ import annotations

TEXT, MMPROJ = "text.gguf", "mmproj.gguf"
