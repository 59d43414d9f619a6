"""Using trained models: loading, scoring and generating with a KV cache."""
