"""Pictures and plots: patches, gates, costs, contact sheets; their colours."""
