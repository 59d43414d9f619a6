"""Training: state, step, loop, and what keeps a long run alive."""
