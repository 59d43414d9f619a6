"""Experiments as Python functions that return a Run; each docstring says what it is and what it needs."""
