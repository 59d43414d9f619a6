"""One save of one checkpoint, from the working folder to the commit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from tinyllama_jax.distributed import Peers
from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.train import checkpoint_files, durable
from tinyllama_jax.train.agree import together
from tinyllama_jax.train.places import Bucket, Folder

FORMAT = 2  # of meta.json and of what it describes


class Save:
    """`open` in the training thread, then `run` in any.

    host: per item and name an array that nobody changes any more; prints: per item what waits for its fingerprints.
    """

    def __init__(
        self,
        place: Folder | Bucket,
        peers: Peers,
        barrier_seconds: float,
        on_event: Callable[[str, int], None],
        step: int,
        host: dict[str, dict],
        prints: dict[str, Callable[[], dict[str, str]]],
    ):
        self.place, self.peers, self.step, self.path = place, peers, step, place.path(step)
        self.about: dict[str, dict] = {}  # per item and name: shape, dtype and fingerprint
        self._barrier_seconds, self._on_event = barrier_seconds, on_event
        self._host, self._prints = host, prints
        self._waiting: list[Callable[[], None]] | Exception | None = None

    def open(self, token: str) -> None:
        """Agrees on the working folder; arrays that lie on several processes are copied to the host here."""
        error, lead = None, self.peers.lead
        n_bytes = sum(array.nbytes for arrays in self._host.values() for array in arrays.values())
        if lead:  # before any other process writes into it
            error = self._make(token, n_bytes)
        token = self.peers.tell("working folder", token)
        if not lead:
            error = self._make(token, n_bytes)
        if error is not None:
            self._waiting = error
        elif any(isinstance(a, jax.Array) for arrays in self._host.values() for a in arrays.values()):
            try:
                self._waiting = self._begin()
            except Exception as caught:  # whatever orbax raises; all processes hear of it in `run`
                self._waiting = caught

    def _make(self, token: str, n_bytes: int) -> OSError | None:
        self.working = self.place.working(self.step, token)
        if self.peers.lead or not self.place.shared:
            try:
                self.place.make(self.working, n_bytes)
            except OSError as error:  # all processes hear of it in `run`
                return error
        return None

    def _begin(self) -> list[Callable[[], None]]:
        return [checkpoint_files.begin(self.working / item, arrays) for item, arrays in self._host.items()]

    def run(self, meta: dict, permanent: bool, tokenizer_files: list[Path]) -> None:
        """Writes, and commits when every process has written.  CheckpointError in all if it fails in any."""
        try:
            self._together("written", lambda: self._write(meta, permanent, tokenizer_files))
            checksums = self._kept()
            self._together("committed", lambda: self._commit(checksums))
            self._together("noted", lambda: self._on_event("committed", self.step))
        except Exception as error:
            if self.peers.lead or not self.place.shared:
                self.place.discard(self.working)
            raise CheckpointError(not_written(self.path, error)) from error

    def _write(self, meta: dict, permanent: bool, tokenizer_files: list[Path]) -> None:
        self._on_event("writing", self.step)
        if isinstance(self._waiting, Exception):
            raise self._waiting
        for wait in self._begin() if self._waiting is None else self._waiting:
            wait()
        self.about = {item: self._describe(item) for item in self._host}
        del self._host, self._waiting
        if self.peers.lead:
            if self.place.exists(self.step):  # a step that was permanent once stays so
                permanent = permanent or self.place.is_permanent(self.step)
            for source in tokenizer_files:
                (self.working / "tokenizer").mkdir(exist_ok=True)
                shutil.copyfile(source, self.working / "tokenizer" / source.name)
            about = {"format": FORMAT, "step": self.step, "permanent": permanent, "leaves": self.about}
            (self.working / "meta.json").write_text(json.dumps({**meta, "checkpoint": about}, indent=1) + "\n")

    def _describe(self, item: str) -> dict[str, dict]:
        found = self._prints[item]()
        return {
            name: {"shape": list(array.shape), "dtype": array.dtype.name, "fingerprint": found[name]}
            for name, array in self._host[item].items()
        }

    def _kept(self) -> dict[str, str]:
        """Checksums of all files, which are durable where they are; each process sees to a part of them."""
        at, count = self.peers.index, self.peers.count
        lists = self.peers.lead or not self.place.shared
        listed = self._together("listed", lambda: durable.files_of(self.working) if lists else None)
        names = listed[0][at::count] if self.place.shared else listed[at]
        parts = self._together("kept", lambda: self.place.keep(self.working, names, self.step))
        return {name: checksum for part in parts for name, checksum in sorted(part.items())}

    def _commit(self, checksums: dict[str, str]) -> None:
        self._on_event("written", self.step)
        if self.peers.lead:
            self.place.commit(self.working, self.step, checksums)
        if not self.place.shared:
            self.place.discard(self.working)

    def _together(self, phase: str, work: Callable[[], object]) -> list:
        return together(self.peers, f"save {self.step} {phase}", self._barrier_seconds, work)


def not_written(path, error: Exception) -> str:
    """One line for whatever went wrong."""
    text = str(error) if isinstance(error, CheckpointError) else durable.one_line(error)
    text = text.removeprefix(f"{path}: checkpoint could not be written: ").removesuffix(
        "; earlier checkpoints are intact"
    )
    return f"{path}: checkpoint could not be written: {text}; earlier checkpoints are intact"
