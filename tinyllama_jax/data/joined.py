"""A token store together with one to replay: two stores behind the face of one.

The sources of the second are called replay/NAME, in mixtures, in validation and in the records of a run: what a model
forgets while it learns new text is the loss on them.  Each window comes from one source, and data/order.py holds every
source within one window of its share, so a replay share is exact.
"""

from __future__ import annotations

import hashlib

from tinyllama_jax.config import REPLAY
from tinyllama_jax.data.splits import ChosenWindows, Split
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.data.tokenizer_extend import begins_with
from tinyllama_jax.errors import DataError


class JoinedStore:
    """What pipeline, order, validation and checkpoints use of a `TokenStore`, of two of them.

    path, location, storage, parent, window_tokens and the tokenizer are those of the new text.  domains and the
    manifest's splits have both.  manifest_sha256 is of the two manifests' hashes.
    """

    def __init__(self, new: TokenStore, replay: TokenStore):
        """Raises DataError unless ids mean the same in both, and documents are marked the same way."""
        _check(new, replay)
        self.new, self.replay = new, replay
        self.path, self.location, self.storage, self.parent = new.path, new.location, new.storage, new.parent
        self.vocab_size, self.window_tokens = new.vocab_size, new.window_tokens
        self.domains = (*new.domains, *(REPLAY + domain for domain in replay.domains))
        self.manifest_sha256 = hashlib.sha256(f"{new.manifest_sha256} {replay.manifest_sha256}".encode()).hexdigest()
        self.manifest = new.manifest | {
            "packing": new.manifest["packing"] if replay.manifest["packing"] == "none" else replay.manifest["packing"],
            "splits": {
                split: domains | {REPLAY + name: entry for name, entry in replay.manifest["splits"][split].items()}
                for split, domains in new.manifest["splits"].items()
            },
        }

    def split(self, split: str, domain: str) -> Split | ChosenWindows:
        if domain.startswith(REPLAY):
            return self.replay.split(split, domain.removeprefix(REPLAY))
        return self.new.split(split, domain)

    def tokenizer(self) -> Tokenizer:
        return self.new.tokenizer()


def reopen(identity: dict, cache: str = "") -> TokenStore | JoinedStore:
    """The store that a run's records name (train/start.py: store_identity)."""
    store = TokenStore.open(identity["path"], cache=cache)
    if not identity.get("replay"):
        return store
    return JoinedStore(store, TokenStore.open(identity["replay"], cache=cache))


def _check(new: TokenStore, replay: TokenStore) -> None:
    if replay.manifest["tokenizer"]["sha256"] != new.manifest["tokenizer"]["sha256"]:
        if not begins_with(new.tokenizer(), replay.tokenizer()):
            raise DataError(
                f"{replay.path}: its ids mean other words than those of {new.path}, so it cannot be replayed; "
                "prepare both with one tokenizer, or the new text with one that extends the other's"
            )
    marks, others = new.manifest["document_marks"], replay.manifest["document_marks"]
    if marks != others:
        raise DataError(
            f"{replay.path}: its documents are marked by {others!r}, and those of {new.path} by {marks!r}; prepare one "
            f"of them again with the other's --document-marks"
        )
    if taken := [domain for domain in new.domains if domain.startswith(REPLAY)]:
        raise DataError(f"{new.path}: its source {taken[0]!r} has the name of a replayed one; prepare it under another")
