"""What several test files share: recorded cases, processes, a browser, data made on the spot."""
