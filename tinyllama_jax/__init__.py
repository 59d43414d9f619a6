"""tinyllama_jax: pretraining of TinyLlama-class language models in JAX."""

__version__ = "0.1.0"
