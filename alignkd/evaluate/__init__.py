"""Measures the accuracy of a model folder by greedy generation."""
