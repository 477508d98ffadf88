"""Is a distilled student better, and what does each term do: paired runs on the sample task, with intervals.

``python -m benchmarks.evidence`` trains what is missing and writes a record per run; ``python -m
benchmarks.evidence.table`` makes the tables and the plot of docs/evidence.md from the records.
"""
