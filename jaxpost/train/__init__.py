"""Training: the step, objectives, the optimizer, checkpoints, metrics and the loop that every offline stage shares."""
