"""What `--eval` reports: scores, decisions, operations, throughput, budgets; a checkpoint on images of the user."""
