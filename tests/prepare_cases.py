"""What the tests of prepare share."""

from pathlib import Path

import pytest

from tinyllama_jax.data.prepare import prepare
from tinyllama_jax.errors import DataError


def complaint(*arguments, **keywords) -> str:
    """The one line that prepare ends with."""
    with pytest.raises(DataError) as caught:
        prepare(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
