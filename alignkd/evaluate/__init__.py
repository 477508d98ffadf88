"""Accuracy of a model folder by greedy generation."""
