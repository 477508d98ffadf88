"""What `alignkd report` shows of the models themselves. It needs torch: a program of its own."""
