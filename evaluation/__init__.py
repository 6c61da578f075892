"""What `--eval` reports: scores, decisions, operations, throughput, token budgets.

Also a checkpoint prepared for a user's own images (`inference`), and what a report shows of
evaluations (`report_scores`, `report_decisions`).
"""
