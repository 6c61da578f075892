"""Models as files that other runtimes read, and the one that predict.py reads back."""
