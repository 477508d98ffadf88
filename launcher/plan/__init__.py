"""What a run will need, worked out from configurations alone, before anything queues. Never imports torch."""
