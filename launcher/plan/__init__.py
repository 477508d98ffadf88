"""What a run needs (memory, traffic, compute), computed from configurations before anything queues."""
