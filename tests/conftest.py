"""Set before PyTorch is imported: threads that wait for each other sleep.

The tests' tensors are tiny. On a shared machine, threads that spin while they wait take the
processor from those that they wait for, and everything becomes ten times slower.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
