"""The Llama-family transformer: RoPE, initial weights, the modules of a block, the model as functions."""
