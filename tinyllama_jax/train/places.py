"""Where the checkpoints of a run are kept, and what the place makes of "complete".

A folder: a checkpoint is written under a temporary name, and the rename is the commit.  All processes write into one
working folder, so it must be on a disk that they share.

An object store (`gs://`, `s3://`, anything that fsspec knows): it has no rename, so a checkpoint is there when its
`checksums.json` is, which is written last.  Each process writes its files to a local folder of its own and uploads
them; to restore, it downloads the ones that it needs.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tinyllama_jax.data.storage import Storage
from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.train import durable

CHECKSUMS = "checksums.json"


def place_of(directory: str | os.PathLike) -> Folder | Bucket:
    return Bucket(os.fspath(directory)) if "://" in os.fspath(directory) else Folder(Path(directory))


class Folder:
    """Checkpoints in a folder that every process sees."""

    shared = True  # what one process writes, the others see

    def __init__(self, directory: Path):
        self.directory = directory

    def mend(self) -> None:
        durable.mend(self.directory)

    def steps(self) -> list[int]:
        return durable.steps(self.directory)

    def path(self, step: int) -> Path:
        return durable.path_of(self.directory, step)

    def exists(self, step: int) -> bool:
        return self.path(step).exists()

    def set_aside_before(self) -> list[str]:
        return [str(path) for path in sorted(self.directory.glob("*.corrupt*"))]

    def working(self, step: int, token: str) -> Path:
        """Where the processes write."""
        path = self.path(step)
        return path.with_name(f"{path.name}.tmp-{token}")

    def make(self, working: Path, n_bytes: int) -> None:
        """Makes the working folder; OSError if there is no room for so many bytes."""
        working.mkdir()
        durable.require_room(working, n_bytes)

    def keep(self, working: Path, names: Iterable[str], step: int) -> dict[str, str]:
        """Makes files of the working folder durable; their checksums."""
        return durable.keep(working, names)

    def commit(self, working: Path, step: int, checksums: dict[str, str]) -> None:
        durable.seal(working, checksums)
        durable.commit(working, self.path(step))

    def discard(self, working: Path) -> None:
        durable.discard(working)

    def meta(self, step: int) -> dict:
        return durable.verify(self.path(step), only="meta.json")

    def verify(self, step: int) -> None:
        """Raises Damaged unless every file is as it was written."""
        durable.verify(self.path(step))

    def is_permanent(self, step: int) -> bool:
        return durable.is_permanent(self.path(step))

    def checksums(self, step: int) -> dict[str, str]:
        return durable.read_checksums(self.path(step))

    def fetch(self, step: int, names: Iterable[str]) -> Path:
        """A local folder with (at least) these files of a checkpoint."""
        return self.path(step)

    def release(self, folder: Path) -> None:
        pass

    def set_aside(self, step: int, word: str = "corrupt") -> str:
        return durable.set_aside(self.path(step), word)

    def remove(self, step: int) -> None:
        durable.remove(self.path(step))


class Lone(Folder):
    """One checkpoint by itself, wherever it is."""

    def path(self, step: int) -> Path:
        return self.directory


class Bucket:
    """Checkpoints in an object store; each process has a local folder, in TMPDIR, for its part of one of them."""

    shared = False

    def __init__(self, root: str):
        self.directory = root.rstrip("/")
        self.storage = Storage(self.directory)

    def mend(self) -> None:
        """Deletes what was never complete."""
        names = self.storage.files()
        complete = {name.partition("/")[0] for name in names if name.endswith(f"/{CHECKSUMS}")}
        for name in names:
            folder = name.partition("/")[0]
            if durable.is_final(folder) and folder not in complete:
                self.storage.remove(name)

    def steps(self) -> list[int]:
        folders = [name.rpartition("/")[0] for name in self.storage.files() if name.endswith(f"/{CHECKSUMS}")]
        return sorted(int(folder) for folder in folders if durable.is_final(folder))

    def path(self, step: int) -> str:
        return f"{self.directory}/{step:08d}"

    def exists(self, step: int) -> bool:
        return step in self.steps()

    def set_aside_before(self) -> list[str]:
        folders = {name.partition("/")[0] for name in self.storage.files()}
        return [f"{self.directory}/{folder}" for folder in sorted(folders) if ".corrupt" in folder]

    def working(self, step: int, token: str) -> Path:
        return Path(tempfile.gettempdir()) / f"tinyllama-{step:08d}-{token}-{os.getpid()}" / token

    def make(self, working: Path, n_bytes: int) -> None:
        working.mkdir(parents=True)

    def keep(self, working: Path, names: Iterable[str], step: int) -> dict[str, str]:
        """Uploads them below the working folder's name, which no other save of the same step has."""
        checksums = durable.checksums_of(working, names)
        files = {f"{step:08d}/{working.name}/{name}": working / name for name in checksums}
        self.storage.upload(files)
        return {f"{working.name}/{name}": checksum for name, checksum in checksums.items()}

    def commit(self, working: Path, step: int, checksums: dict[str, str]) -> None:
        folder = f"{step:08d}"
        self.storage.write(f"{folder}/{CHECKSUMS}", json.dumps(checksums, indent=1).encode())
        for name in self.storage.files(folder):  # of an earlier save of the same step
            if name not in checksums and name != CHECKSUMS:
                self.storage.remove(f"{folder}/{name}")

    def discard(self, working: Path) -> None:
        durable.discard(working.parent)

    def _contents(self, step: int) -> dict[str, str]:
        path = self.path(step)
        try:
            found = json.loads(self.storage.bytes(f"{step:08d}/{CHECKSUMS}"))
            return {str(name): str(checksum) for name, checksum in found.items()}
        except FileNotFoundError as error:
            raise durable.Damaged(f"{path}: {CHECKSUMS}: no such object") from error
        except (ValueError, AttributeError) as error:
            raise durable.Damaged(f"{path}: {CHECKSUMS} is not readable") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {durable.one_line(error)}") from error

    def meta(self, step: int) -> dict:
        folder = self.fetch(step, ["meta.json"])
        try:
            durable.compare(folder, self.checksums(step), ["meta.json"], self.path(step))
            return json.loads((folder / "meta.json").read_text())
        finally:
            self.release(folder)

    def verify(self, step: int) -> None:
        """Raises Damaged when an object is missing; contents, which would cost a download, are the store's own care."""
        missing = sorted(set(self._contents(step)) - set(self.storage.files(f"{step:08d}")))
        if missing:
            raise durable.Damaged(f"{self.path(step)}: {missing[0]}: no such object")

    def is_permanent(self, step: int) -> bool:
        try:
            return self.meta(step)["checkpoint"]["permanent"]
        except (CheckpointError, KeyError, TypeError):
            return True  # unreadable: not ours to delete

    def checksums(self, step: int) -> dict[str, str]:
        return {name.partition("/")[2]: checksum for name, checksum in self._contents(step).items()}

    def fetch(self, step: int, names: Iterable[str]) -> Path:
        folder, wanted = Path(tempfile.gettempdir()) / f"tinyllama-{step:08d}-restored-{os.getpid()}", set(names)
        files = {
            f"{step:08d}/{name}": folder / short
            for name in self._contents(step)
            if (short := name.partition("/")[2]) in wanted and not (folder / short).exists()
        }
        try:
            self.storage.download(files)
        except FileNotFoundError as error:
            raise durable.Damaged(f"{self.path(step)}: {durable.one_line(error)}") from error
        except OSError as error:
            raise CheckpointError(f"{self.path(step)}: cannot be read: {durable.one_line(error)}") from error
        return folder

    def release(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def set_aside(self, step: int, word: str = "corrupt") -> str:
        """Copies everything, then deletes; until the last deletion one of the two is whole."""
        taken = {name.partition("/")[0] for name in self.storage.files()}
        target, number = f"{step:08d}.{word}", 1
        while target in taken:
            number += 1
            target = f"{step:08d}.{word}{number}"
        names = list(self.storage.files(f"{step:08d}"))
        for name in names:
            self.storage.copy(f"{step:08d}/{name}", f"{target}/{name}")
        self._delete(step, names)
        return target

    def remove(self, step: int) -> None:
        self._delete(step, list(self.storage.files(f"{step:08d}")))

    def _delete(self, step: int, names: list[str]) -> None:
        for name in sorted(names, key=lambda name: name != CHECKSUMS):  # first what makes it count
            self.storage.remove(f"{step:08d}/{name}")
