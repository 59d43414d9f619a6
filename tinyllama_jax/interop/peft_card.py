"""README.md of an exported adapter: what it is, its base, how the two are loaded, how it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinyllama_jax import flops
from tinyllama_jax.config import Adapter, Model
from tinyllama_jax.interop import model_card
from tinyllama_jax.interop.peft_config import MODULES, targets_of


def card(
    checkpoint: Path,
    meta: dict,
    model: Model,
    adapter: Adapter,
    name: str,
    base: str,
    *,
    resized: bool,
    license: str = "",
    language: str = "",
) -> str:
    """The card as Markdown with its YAML head.

    name: of the exported folder; base: as adapter_config.json names it; resized: whether words were added, so that the
    base's tables must be lengthened first.  license, language: as of model_card.card.
    """
    run = model_card.run_of(checkpoint)
    sections = [
        ("", _what_it_is(model, adapter, base)),
        ("How to use it", use_text(name, base, model, resized=resized)),
        ("Training", _training(meta, run, model, adapter)),
        (
            "License",
            f"`{license}`" if license else "The license is not stated.  Without one, assume that there is none.",
        ),
    ]
    head: dict[str, Any] = {"license": license or "unknown"}
    if language:
        head["language"] = [code.strip() for code in language.split(",") if code.strip()]
    tags = ["lora" if adapter.method == "lora" else "prefix-tuning", "llama", "tinyllama_jax"]
    head |= {"library_name": "peft", "base_model": base, "pipeline_tag": "text-generation", "tags": tags}
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections)
    return f"---\n{model_card.front_matter(head)}---\n\n# {name}\n\n{body}\n"


def uses(directory: str, base: str, model: Model, *, resized: bool) -> dict[str, str]:
    """What to type to use an exported adapter: {"peft": lines of Python}."""
    there, beside = json.dumps(directory, ensure_ascii=False), json.dumps(base, ensure_ascii=False)
    lines = [
        "from peft import PeftModel as P",
        "from transformers import AutoModelForCausalLM as M",
        f"base = M.from_pretrained({beside})",
        *([f"base.resize_token_embeddings({model.vocab_size})"] if resized else []),
        f"model = P.from_pretrained(base, {there})",
    ]
    return {"peft": "\n".join(lines)}


def use_text(name: str, base: str, model: Model, *, resized: bool) -> str:
    return f"```python\n{uses(name, base, model, resized=resized)['peft']}\n```"


def _what_it_is(model: Model, adapter: Adapter, base: str) -> str:
    count = f"{flops.adapter_parameters(model, adapter):,} trained parameters beside"
    of_base = f"{count} the {flops.parameter_counts(model)['total']:,} of its base, `{base}`"
    if adapter.method == "prefix":
        return f"A prefix of {adapter.prefix_tokens} trained keys and values in each layer (prefix tuning): {of_base}."
    kind = "rank-stabilised LoRA" if adapter.rank_stabilised else "LoRA"
    where = ", ".join(f"`{MODULES[target]}`" for target in targets_of(adapter))
    return f"A {kind} of rank {adapter.rank}, alpha {adapter.alpha:g}, of {where}: {of_base}."


def _training(meta: dict, run: Any, model: Model, adapter: Adapter) -> str:
    text = model_card.training(meta, run, model)
    if meta.get("imported_from"):
        return text
    if adapter.base_weights == "float32":
        return text
    return (
        f"{text}\n\nThe base's matrices were kept in {adapter.base_weights} while this was trained.  Beside a base in "
        "another precision the numbers differ a little; merged with tinyllama_jax (`export hf`, `finetune merge`) they "
        "are those of training."
    )
