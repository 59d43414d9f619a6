"""The folders in a place of an object store: how a supervisor sees checkpoints that are not on its machine."""

from __future__ import annotations


def folders(address: str) -> list[str]:
    """Names of what lies directly in `address` (gs://..., s3://..., memory://...); OSError when it cannot be asked."""
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(address)
        filesystem.invalidate_cache()
        found = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return []
    except Exception as error:  # each protocol's package has its own
        raise OSError(f"{address}: {error}") from error
    return [entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory"]
