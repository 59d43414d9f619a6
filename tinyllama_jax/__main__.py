"""`python -m tinyllama_jax` is the same program as the console script `tinyllama`."""

import sys

from tinyllama_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
