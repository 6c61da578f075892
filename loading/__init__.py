"""What lies between a file and a batch: decoding, transforms, order, workers. `datasets.py` puts it
together.
"""
