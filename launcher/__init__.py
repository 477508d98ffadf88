"""The command line: configuration in, run folder and started ranks out. Nothing here imports torch."""
