"""Pictures and plots: patches, gates, costs, contact sheets; their colours; a page of them."""
