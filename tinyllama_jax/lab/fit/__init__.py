"""Fits of laws to tables of finished runs, with numpy and scipy alone."""

import os
import sys

if "numpy" not in sys.modules:
    # Thousands of systems of five equations: threads of the algebra library only wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
