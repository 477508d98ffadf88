"""alignkd: distil a large vision-language model into a small one (Align-KD, CVPR 2025)."""

__version__ = "0.1.0"
