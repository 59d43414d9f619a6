"""What is in an example store, for people and programs: what `inspect STORE` prints of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tinyllama_jax.data.describe import SHOWN_LINES, shown
from tinyllama_jax.data.store import MANIFEST
from tinyllama_jax.data.tokenizer import Tokenizer
from tinyllama_jax.data.verify import VERIFY, Progress, silent
from tinyllama_jax.errors import DataError
from tinyllama_jax.finetune.store import MALFORMED, ExampleStore

OPEN, CLOSE = "\u27e6", "\u27e7"  # around what is learned
CHECKED_WINDOWS = 1024  # read at once
SHOWN_CHARACTERS = 2000


def describe(
    path: str | Path, *, samples: int = 0, seed: int = 0, verify: bool = False, progress: Progress = silent
) -> tuple[dict, list[str]]:
    """-> (everything as JSON can hold it, lines to print).

    samples: examples to decode per domain: the first one, then random ones by `seed`; what is learned of them stands
    between OPEN and CLOSE.  verify: read and check everything; the value's "findings" are what is wrong.  Raises
    DataError for a store that cannot be opened.
    """
    store = ExampleStore.open(path)
    value = summary(store)
    verdict = []
    if verify:
        findings = value["findings"] = list(find_damage(store, progress))
        verdict = [f"verified: {len(findings)} findings", *(f"  {line}" for line in findings)]
        if not findings:
            verdict = ["verified: every file, window and count is what the manifest says"]
    try:
        value["samples"] = list(_samples(store, samples, seed))
    except DataError:
        if not value.get("findings"):
            raise
        value["samples"] = []
    return value, [*_lines(value), *verdict]


def summary(store: ExampleStore) -> dict:
    """The manifest's numbers."""
    manifest, made = store.manifest, store.manifest["examples"]
    names = ("kind", "created_by", "template", "pairs", "packing", "window_tokens", "document_marks", "read", "cut")
    return {
        "store": str(store.path),
        "manifest_sha256": store.manifest_sha256,
        **{name: manifest[name] for name in names},
        "loss_on": made["loss_on"],
        "sources": made["sources"],
        "validation_sources": made["validation_sources"],
        "dropped": manifest["dropped"],
        "tokenizer": {key: manifest["tokenizer"][key] for key in ("sha256", "vocab_size", "bos_id", "eos_id")},
        "domains": {
            domain: {
                split: {key: count for key, count in domains[domain].items() if key != "sha256"}
                | _shares(domains[domain], store)
                for split, domains in manifest["splits"].items()
            }
            for domain in store.domains
        },
    }


def _shares(entry: dict, store: ExampleStore) -> dict:
    """Of all tokens those that are learned, and of all places those that are padding."""
    return {
        "learned_share": entry["learned"] / max(1, entry["tokens"]),
        "padding_share": 1 - entry["tokens"] / max(1, entry["windows"] * store.window_tokens),
    }


def find_damage(store: ExampleStore, progress: Progress = silent) -> Iterator[str]:
    """Everything that is wrong with the store, a line each: files, their hashes, every window, the counts."""
    manifest = store.manifest
    known = {MANIFEST, MALFORMED, *manifest["tokenizer"]["files"]}
    for split, domains in manifest["splits"].items():
        for domain, entry in domains.items():
            part = store.split(split, domain)
            known.add(part.path.relative_to(store.path).as_posix())
            with part.path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    yield f"{part.path}: differs from its SHA-256 in the manifest"
            yield from _windows(store, part, entry, progress)
    for name in sorted(store.storage.files().keys() - known):
        yield f"{store.path}/{name}: is no part of the store; remove it"


def _windows(store: ExampleStore, part, entry: dict, progress: Progress) -> Iterator[str]:
    tokens = learned = documents = 0
    continues = store.manifest["packing"] == "concatenated"
    for first in range(0, entry["windows"], CHECKED_WINDOWS):
        ids = np.arange(first, min(first + CHECKED_WINDOWS, entry["windows"]))
        try:
            found = part.read(ids, store.window_tokens)
        except DataError:
            for number in ids:
                try:
                    part.read([number], store.window_tokens)
                except DataError as error:
                    yield str(error)
            return
        inside = np.arange(store.window_tokens) < found.used_N[:, None]
        if (found.tokens_NT >= store.vocab_size).any():
            yield f"{part.path}: windows {first}..{ids[-1]} hold ids that the vocabulary has not"
        if (found.learned_NT & ~inside).any() or (found.tokens_NT[~inside] != 0).any():
            yield f"{part.path}: windows {first}..{ids[-1]} hold something behind their last token"
        tokens += int(found.used_N.sum())
        learned += int(found.learned_NT.sum())
        documents += int((found.documents_NT[:, -1] + 1).sum())
        progress(VERIFY, documents, tokens, 0.0)
    counted = {"tokens": tokens, "learned": learned} | ({} if continues else {"documents": documents})
    for name, count in counted.items():
        if count != entry[name]:
            yield f"{part.path}: has {count} {name}, the manifest says {entry[name]}"


def _samples(store: ExampleStore, count: int, seed: int) -> Iterator[dict]:
    random = np.random.default_rng(seed)
    tokenizer = store.tokenizer() if count else None
    for domain in store.domains if count else ():
        part = store.split("train", domain)
        ids = np.append(0, random.integers(0, part.windows(store.window_tokens), count - 1))
        found = part.read(ids, store.window_tokens)
        for row, window in enumerate(ids.tolist()):
            documents = found.documents_NT[row, : found.used_N[row]]
            document = int(random.integers(0, documents[-1] + 1)) if row and not store.pairs else 0
            for which in (0, 1) if store.pairs else (document,):
                inside = np.flatnonzero(documents == which)
                tokens, learned = found.tokens_NT[row, inside], found.learned_NT[row, inside]
                yield {
                    "domain": domain,
                    "window": window,
                    "document": which,
                    "tokens": tokens.size,
                    "learned": int(learned.sum()),
                    "text": marked(tokenizer, tokens, learned),
                }


def marked(tokenizer: Tokenizer, tokens: np.ndarray, learned: np.ndarray) -> str:
    """The text of ids [T], what is learned of it between OPEN and CLOSE; BOS, EOS and control tokens by their names."""
    pieces = tokenizer.pieces()
    silent_ids = tokenizer.token_bytes() == 0
    text = ""
    for run in np.split(np.arange(tokens.size), np.flatnonzero(np.diff(learned)) + 1):
        part = ""
        for group in np.split(run, np.flatnonzero(np.diff(silent_ids[tokens[run]])) + 1):
            if silent_ids[tokens[group[0]]]:
                part += "".join(str(pieces[i]) for i in tokens[group])
            else:
                part += tokenizer.decode_further(tokens[group])
        text += f"{OPEN}{part}{CLOSE}" if learned[run[0]] else part
    return text


# --- for people ---


def _lines(value: dict) -> Iterator[str]:
    form = "pairs of answers, one pair" if value["pairs"] else f"examples, packed as {value['packing']},"
    yield (
        f"{value['store']}: {form} to windows of {value['window_tokens']} tokens; template {value['template']}, "
        f"document marks {value['document_marks']}, loss on {value['loss_on']}, vocabulary "
        f"{value['tokenizer']['vocab_size']}"
    )
    yield f"  manifest SHA-256 {value['manifest_sha256']}, by {value['created_by']}"
    yield from (f"  source {source}" for source in value["sources"])
    yield from (f"  validation source {source}" for source in value["validation_sources"])
    read = value["read"]
    told = f" (named in {MALFORMED})" if read["malformed"] else ""
    yield f"  read {read['rows']:,} rows; {read['malformed']:,} malformed{told}; {value['cut']:,} cut to their window"
    yield from (f"  left out {n:,}: {reason}" for reason, n in value["dropped"].items())
    yield ""
    width = max(6, *map(len, value["domains"]))
    titles = f"{'documents':>11} {'tokens':>15} {'learned':>8} {'windows':>11} {'padding':>8}"
    yield f"{'domain':<{width}} {'split':<10} {titles}"
    for domain, splits in value["domains"].items():
        for split, part in splits.items():
            yield (
                f"{domain:<{width}} {split:<10} {part['documents']:>11,} {part['tokens']:>15,} "
                f"{100 * part['learned_share']:>6.2f} % {part['windows']:>11,} {100 * part['padding_share']:>6.2f} %"
            )
    for sample in value["samples"]:
        yield ""
        yield (
            f"-- {sample['domain']}, window {sample['window']}, document {sample['document']} in it, "
            f"{sample['tokens']} tokens; {sample['learned']} are learned, in {OPEN} {CLOSE}:"
        )
        yield from shown(sample["text"], SHOWN_CHARACTERS, 4 * SHOWN_LINES)
    if value["samples"]:
        yield ""
