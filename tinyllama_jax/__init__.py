"""tinyllama_jax: pretraining of TinyLlama-class language models in JAX."""

import os

__version__ = "0.1.0"

# Devices simulated on a CPU wait for each other inside collectives, each holding a thread of a pool that has as many
# as there are cores; with fewer cores than devices the last one may never get its turn, and XLA aborts.
if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    os.environ.setdefault("PJRT_NPROC", "64")
