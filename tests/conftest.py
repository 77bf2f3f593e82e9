"""One thread for the whole suite, set before torch is imported: for models this small a second one only waits."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
