"""From a file to a batch: decoding, transforms, order, workers. `datasets.py` combines them."""
