"""The benchmarks: their files as published, the official prompts, the official scoring rules."""
