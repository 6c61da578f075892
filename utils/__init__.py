"""What the training program needs apart from the method: errors, processes, checkpoints, logs."""
