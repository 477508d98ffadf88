"""TensorBoard and Weights & Biases, from the rows of ``metrics.jsonl``.

A process beside rank 0 (``python -m alignkd.tracking RUN``) reads the rows from the disk, so whatever goes
wrong there (no network, a full disk, a missing package) neither ends nor slows the training.

| in the run folder's tracking/ | what it is |
|---|---|
| tensorboard/ | event files, one per attempt |
| wandb/ | what W&B keeps of a run; in offline mode all of it |
| tensorboard.json, wandb.json | ``step``: the last row that was written; of W&B also the ``id`` of its run |
"""
