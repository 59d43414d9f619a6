"""What a test needs of the machine and does not get."""

import os

import pytest


def cannot(say: str):
    """Skips the test here; fails it in CI, where nothing is left out without a word."""
    pytest.fail(say) if os.environ.get("CI") else pytest.skip(say)
