"""Measurements, one command each: ``python -m benchmarks.step``. Never part of a test."""
