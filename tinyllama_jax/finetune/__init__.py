"""From a base checkpoint to what people use: examples, adapters, preferences, recipes."""
