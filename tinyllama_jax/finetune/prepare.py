"""Makes an example store (store.py) of files of examples: read, rendered, split, packed, and there at once.

Everything is written under a temporary name beside the store, and renamed: whoever is killed leaves a folder that the
next one who makes the store removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllama_jax import __version__, configio
from tinyllama_jax.config import Examples
from tinyllama_jax.data import durable
from tinyllama_jax.data.durable import writing
from tinyllama_jax.data.plan import Progress, silent
from tinyllama_jax.data.prepare import locked
from tinyllama_jax.data.store import MANIFEST, SPLITS
from tinyllama_jax.data.tokenizer import Marks, Tokenizer
from tinyllama_jax.data.tokenizer_backends import JSON_CONFIG_FILE
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.finetune import packing
from tinyllama_jax.finetune.collect import Reading, Renderer, Spool, held_out
from tinyllama_jax.finetune.forms import Example
from tinyllama_jax.finetune.rows import Source, parse
from tinyllama_jax.finetune.store import FORMAT_VERSION, KIND, MALFORMED, SUFFIX, TOKENIZER, ExampleStore, system_of
from tinyllama_jax.generate.chat import TEMPLATES, Chat, choose, control_ids
from tinyllama_jax.generate.jinja import jinja
from tinyllama_jax.generate.templates import Template
from tinyllama_jax.terminal import say as say_on_stderr

TRAIN, VALIDATION = SPLITS
# Beside the vocabulary, what else says how a tokenizer is used.
TEMPLATE_FILE = "chat_template.jinja"
_BESIDE = (JSON_CONFIG_FILE, TEMPLATE_FILE, "special_tokens_map.json", "added_tokens.json")
# What does not change what a store holds, or is compared by its content.
_NOT_COMPARED = ("sources", "validation_sources", "malformed_share", "tokenizer")


class _Asked(NamedTuple):
    examples: Examples
    sources: dict[str, list[Source]]  # by domain
    validation: dict[str, list[Source]]
    window_tokens: int
    tokenizer: Path  # file or folder
    marks: Marks

    def made_of(self) -> dict:
        """What a store of it must have been made of; compared by `_differences`."""
        options = configio.to_dict(self.examples)
        return {
            "options": {name: value for name, value in options.items() if name not in _NOT_COMPARED},
            "window_tokens": self.window_tokens,
            "document_marks": self.marks,
            "tokenizer": Tokenizer.load(self.tokenizer).sha256,
        }

    def inputs(self) -> dict:
        return {
            split: [
                {"domain": domain, "form": source.form, "columns": dict(source.columns), "files": source.identity()}
                for domain, sources in domains.items()
                for source in sources
            ]
            for split, domains in ((TRAIN, self.sources), (VALIDATION, self.validation))
        }


def prepare(
    examples: Examples,
    out: str | Path,
    *,
    window_tokens: int,
    tokenizer_folder: str | Path,
    marks: Marks,
    progress: Progress = silent,
    say: Callable[[str], None] = say_on_stderr,
) -> Path:
    """Makes the example store `out` unless it is there already; returns its path.

    window_tokens: data.sequence_tokens + 1.  tokenizer_folder: the base checkpoint's, for examples that name none.
    marks: how documents were marked in what the base was trained on; what precedes an example.
    A store that was made of the same is left as it is.  Raises DataError for a store made of something else and for
    anything else under that name, for files that cannot be read and when too many rows are malformed; UsageError and
    ConfigError for options that contradict each other or the tokenizer.
    """
    out = Path(os.path.abspath(out))
    asked = _asked(examples, window_tokens, tokenizer_folder, marks)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not _complete(asked, out, say):
            with locked(out, progress):
                if not _complete(asked, out, say):
                    _make(asked, out, progress, say)
    return out


def _asked(examples: Examples, window_tokens: int, tokenizer_folder: str | Path, marks: Marks) -> _Asked:
    sources: dict[str, list[Source]] = {}
    for spec in examples.sources:
        source = parse(spec, examples.form)
        sources.setdefault(source.name, []).append(source)
    validation: dict[str, list[Source]] = {}
    for spec in examples.validation_sources:
        source = parse(spec, examples.form)
        name = source.name
        if name not in sources:
            if len(sources) > 1:
                raise ConfigError(
                    f"examples.validation_sources: {spec!r} is named {name!r}, and sources are {', '.join(sources)}; "
                    f"write NAME={spec} with one of these names"
                )
            name = next(iter(sources))
        validation.setdefault(name, []).append(source)
    if not validation and not examples.validation_share:
        raise ConfigError(
            "examples.validation_share is 0 and there are no examples.validation_sources: nothing would be held out"
        )
    return _Asked(examples, sources, validation, window_tokens, Path(examples.tokenizer or tokenizer_folder), marks)


def _complete(asked: _Asked, out: Path, say: Callable[[str], None]) -> bool:
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out}: exists and is no example store; name another data.store")
        return False
    manifest = ExampleStore.open(out).manifest
    found, wanted = dict(manifest["made_of"]), asked.made_of()
    inputs = found.pop("inputs")
    differences = [
        f"{name}: {found[name]!r} then, {value!r} now"
        for name, value in wanted.items()
        if name != "options" and found[name] != value
    ]
    before = found["options"]
    differences += [
        f"examples.{name}: {before.get(name)!r} then, {value!r} now"
        for name, value in wanted["options"].items()
        if before.get(name) != value
    ]
    if not differences:
        try:
            if _contents(inputs) != _contents(asked.inputs()):
                differences.append("the files of examples or their forms are others")
        except DataError as error:
            say(f"{out}: is used as it is, for what it was made of cannot be read any more ({error})")
    if differences:
        raise DataError(
            f"{out}: was made of something else ({'; '.join(differences)}); name another data.store, or remove this one"
        )
    return True


def _contents(inputs: dict) -> list:
    """Without the names of files: what they hold is what counts."""
    return [
        (split, one["domain"], one["form"], one["columns"], [file.get("sha256") or file for file in one["files"]])
        for split, sources in inputs.items()
        for one in sources
    ]


def _make(asked: _Asked, out: Path, progress: Progress, say: Callable[[str], None]) -> None:
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of one that was killed
    (unfinished / TOKENIZER).mkdir(parents=True)
    try:
        manifest = _fill(asked, unfinished, progress, say)
        durable.write_record(unfinished / MANIFEST, manifest)
        unfinished.rename(out)
        durable.sync(out.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(asked: _Asked, folder: Path, progress: Progress, say: Callable[[str], None]) -> dict:
    """Writes all but the manifest, which is returned."""
    examples, inputs = asked.examples, asked.inputs()
    tokenizer = _tokenizer(asked, folder / TOKENIZER)
    first = _first(asked)
    pairs = first is not None and first.pair
    template = _template(examples, folder / TOKENIZER, first)
    chat = _chat(asked, folder / TOKENIZER, tokenizer, template, say)
    if examples.template != "auto":
        _describe_template(asked, folder / TOKENIZER, template)
    if pairs and (examples.loss_on != "assistant" or examples.packing == "concatenated"):
        raise ConfigError(
            "pairs of answers are learned as answers, one pair to a window; leave examples.loss_on and "
            "examples.packing as they are"
        )
    if examples.longest_prompt_tokens and not pairs:
        raise ConfigError("examples.longest_prompt_tokens is for pairs of answers, and these are none")
    reading = Reading(Renderer(chat, examples, asked.window_tokens, pairs), progress, say)
    spools = {}
    for split, domains in ((TRAIN, asked.sources), (VALIDATION, asked.validation)):
        for number, (domain, sources) in enumerate(domains.items()):
            spools[split, domain] = Spool(folder / f"{split}-{number}.spool")
            for source in sources:
                reading.collect(source.rows(), spools[split, domain])
    reading.check(examples.malformed_share)
    how = "pairs" if pairs else examples.packing
    splits: dict[str, dict] = {split: {} for split in SPLITS}
    repeated = Counter()
    for split in SPLITS:
        (folder / split).mkdir()
    for domain in asked.sources:
        parts, repeated[domain] = _sides(domain, spools, examples)
        for split, found in parts.items():
            path = folder / split / f"{domain}{SUFFIX}"
            splits[split][domain] = packing.write(path, found, how, asked.window_tokens, tokenizer.vocab_size)
    for spool in spools.values():
        spool.close()
    if reading.malformed:
        durable.write(folder / MALFORMED, "".join(f"{line}\n" for line in reading.malformed).encode())
    for domain, entry in splits[TRAIN].items():
        if not entry["windows"]:
            raise DataError(f"source {domain!r} has no example to learn from; see what was left out, or remove it")
    files = sorted(path for path in (folder / TOKENIZER).iterdir())
    counts = reading.render.counts
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "created_by": f"tinyllama_jax {__version__}",
        "examples": configio.to_dict(examples),
        "made_of": {**asked.made_of(), "inputs": inputs},
        "template": template.name,
        "pairs": pairs,
        "packing": how,
        "window_tokens": asked.window_tokens,
        "document_marks": asked.marks,
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "files": {f"{TOKENIZER}/{file.name}": _sha256(file) for file in files},
        },
        "read": {"rows": reading.rows, "malformed": len(reading.malformed), "tokens": reading.tokens},
        "cut": counts.pop("cut", 0),
        "dropped": dict(counts) | ({"held out as well": n} if (n := repeated.total()) else {}),
        "splits": splits,
    }


def _sides(domain: str, spools: dict[tuple[str, str], Spool], examples: Examples):
    """-> ({split: its examples}, how many were not learned because they are held out)."""
    train, own = spools[TRAIN, domain], spools.get((VALIDATION, domain))
    hashes = train.hashes
    if own is not None:
        apart = np.isin(hashes, own.hashes)
        return {TRAIN: train.read(~apart), VALIDATION: own.read(np.ones(len(own), bool))}, int(apart.sum())
    if examples.validation_sources:  # of other domains
        return {TRAIN: train.read(np.ones(len(train), bool)), VALIDATION: iter(())}, 0
    try:
        apart = held_out(hashes, examples.validation_share)
    except DataError as error:
        raise DataError(f"source {domain!r}: {error}; give more, or examples.validation_sources") from error
    return {TRAIN: train.read(~apart), VALIDATION: train.read(apart)}, 0


def _first(asked: _Asked) -> Example | None:
    found = (source.first() for sources in asked.sources.values() for source in sources)
    return next((example for example in found if example is not None), None)


def _template(examples: Examples, folder: Path, first: Example | None) -> Template:
    """auto: as the tokenizer says; none where there is nothing but text."""
    if examples.template != "auto":
        return TEMPLATES[examples.template]
    if first is None or first.text:
        return TEMPLATES["none"]
    try:
        return choose("auto", folder)
    except ConfigError as error:
        raise ConfigError(f"{str(error).split(';')[0]}; choose with examples.template={'|'.join(TEMPLATES)}") from error


def _chat(asked: _Asked, folder: Path, tokenizer: Tokenizer, template: Template, say: Callable[[str], None]) -> Chat:
    controls = control_ids(folder)
    used = {text: controls.get(text) for text in template.controls}
    if beyond := [text for text, i in used.items() if i is not None and i >= tokenizer.vocab_size]:
        raise ConfigError(
            f"{asked.tokenizer}: lists {', '.join(beyond)} beyond its vocabulary of {tokenizer.vocab_size}; "
            "take the tokenizer.json that has them, or name them in examples.new_tokens"
        )
    if missing := [text for text, i in used.items() if i is None]:
        say(
            f"the tokenizer has no {' and no '.join(missing)}: the template {template.name} is written as text; "
            f"examples.new_tokens={','.join(missing)} adds them"
        )
    system = system_of(asked.examples.system, asked.examples.empty_system)
    return Chat(template, tokenizer, tokenizer.start(asked.marks), controls, system)


def _tokenizer(asked: _Asked, folder: Path) -> Tokenizer:
    """The tokenizer that was asked for, its files copied into the folder, new tokens added."""
    source = Tokenizer.load(asked.tokenizer)
    source.copy_to(folder)
    home = asked.tokenizer if asked.tokenizer.is_dir() else asked.tokenizer.parent
    for name in _BESIDE:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)
    if asked.examples.new_tokens:
        from tinyllama_jax.data.tokenizer_extend import extend

        extended = folder.with_name("extended")
        extend(folder, asked.examples.new_tokens, extended)
        shutil.rmtree(folder)
        extended.rename(folder)
    return Tokenizer.load(folder)


def _describe_template(asked: _Asked, folder: Path, template: Template) -> None:
    """Says beside the vocabulary how dialogues are written, so that checkpoints and what is exported know."""
    system = system_of(asked.examples.system, asked.examples.empty_system)
    if text := jinja(template, system, bos=asked.marks in ("bos", "both")):
        file = folder / JSON_CONFIG_FILE
        settings = json.loads(file.read_bytes()) if file.exists() else {}
        durable.write_json(file, settings | {"chat_template": text})
        (folder / TEMPLATE_FILE).unlink(missing_ok=True)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
