"""Other programs' model formats."""
