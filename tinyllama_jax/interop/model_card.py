"""README.md of an exported model: what it is, how it came about, what was measured, what it is not.

Everything is read: from the checkpoint's metadata, from the run directory where the checkpoint lies in one, and from
the token store's manifest where it can still be found.  What is not recorded is said not to be.
Names of folders and files are shown without the path to them, which says nothing to others.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tinyllama_jax import flops
from tinyllama_jax.config import Model
from tinyllama_jax.errors import DataError
from tinyllama_jax.lab.runs import Run

# Layouts of `prepare` that are the layout of one published data set, by its name on the Hugging Face Hub.
PUBLISHED = {
    "slimpajama": "cerebras/SlimPajama-627B",
    "starcoder": "bigcode/starcoderdata",
    "skypile": "Skywork/SkyPile-150B",
    "proofpile": "EleutherAI/proof-pile-2",
}


def run_of(checkpoint: Path) -> Run | None:
    """The run whose checkpoint this is, if it lies in one."""
    folder = checkpoint.absolute().parent.parent
    try:
        return Run(folder) if checkpoint.absolute().parent.name == "checkpoints" else None
    except DataError:
        return None


def name_of(checkpoint: Path) -> str:
    """What a checkpoint's model is called: its run's name, or that of its own folder."""
    path = checkpoint.absolute()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name


def card(checkpoint: Path, meta: dict, model: Model, name: str, *, license: str = "", language: str = "") -> str:
    """The model card as Markdown with its YAML head.

    name: of the exported folder; license: an identifier of the Hub's list, such as apache-2.0; language: codes of ISO
    639-1, parted by commas.  Both are said to be unstated when empty.
    """
    run, manifest = run_of(checkpoint), _manifest(meta)
    sources = list(_dictionary(manifest.get("recipe")).get("sources") or [])
    sections = [
        ("", _what_it_is(meta, model)),
        ("How to use it", use_text(name, model)),
        ("Training", training(meta, run, model)),
        ("Data", _data(meta, manifest, sources)),
        ("Evaluation", _evaluation(meta, run)),
        ("Limits", _limits(meta, run, model, language)),
        (
            "License",
            f"`{license}`" if license else "The license is not stated.  Without one, assume that there is none.",
        ),
    ]
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections)
    return f"---\n{_head(sources, license, language)}---\n\n# {name}\n\n{body}\n"


def _head(sources: Iterable[str], license: str, language: str) -> str:
    published = [PUBLISHED[layout] for layout in (_source(spec)[1] for spec in sources) if layout in PUBLISHED]
    head: dict[str, Any] = {"license": license or "unknown"}
    if language:
        head["language"] = [code.strip() for code in language.split(",") if code.strip()]
    if published:
        head["datasets"] = list(dict.fromkeys(published))
    head |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["llama", "tinyllama_jax"]}
    return front_matter(head)


def front_matter(head: dict[str, Any]) -> str:
    return yaml.safe_dump(head, sort_keys=False)


def uses(directory: str, model: Model, dtype: str) -> dict[str, str]:
    """What to type to use an exported folder: {"vllm": a command, "transformers": two lines of Python}."""
    quoted = json.dumps(directory, ensure_ascii=False)  # also a text of Python's
    return {
        "vllm": f"vllm serve {shlex.quote(directory)} --max-model-len {model.context_tokens} --dtype {dtype}",
        "transformers": "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        f"model, tokenizer = M.from_pretrained({quoted}), T.from_pretrained({quoted})",
    }


def use_text(name: str, model: Model) -> str:
    use = uses(name, model, "auto")
    lines = use["transformers"].replace("\n", "\n\n")  # as formatters have it
    return f"```python\n{lines}\n```\n\nor\n\n```sh\n{use['vllm']}\n```"


def _what_it_is(meta: dict, model: Model) -> str:
    counts, rope = flops.parameter_counts(model), model.rope
    turned = f"{rope.kind}, theta {rope.theta:g}" + (f", factor {rope.factor:g}" if rope.factor != 1 else "")
    rows = [
        ("parameters", f"{counts['total']:,} ({counts['non_embedding']:,} without embeddings)"),
        ("layers, width, MLP", f"{model.layers}, {model.d_model}, {model.d_ff}"),
        ("heads", f"{model.heads} for queries, {model.kv_heads} for keys and values, of {model.head_dim}"),
        ("vocabulary", f"{model.vocab_size:,}, {'tied' if model.tied_embeddings else 'untied'} embeddings"),
        ("context", f"{model.context_tokens:,} tokens"),
        ("RoPE", turned),
    ]
    step = f"step {meta['step']:,}, {meta['tokens']:,} tokens" if meta.get("tokens") else "without training here"
    text = "A base language model of the Llama family (pre-norm, RMSNorm, SwiGLU, RoPE, grouped-query attention)"
    return f"{text}: {step}.\n\n{_table(('', ''), rows)}"


def training(meta: dict, run: Run | None, model: Model) -> str:
    """How a checkpoint came about, as far as its metadata and its run say."""
    config = _dictionary(meta.get("config")) or (run.config if run else {})
    if source := _dictionary(meta.get("imported_from")):
        where = PurePosixPath(str(source.get("source", ""))).name
        return f"The weights were imported ({source.get('format')}, `{where}`).  How they were trained is not recorded."
    if not config:
        return "How it was trained is not recorded."
    rows = []
    for stage in config.get("curriculum") or []:
        weights = _dictionary(stage.get("mixture"))
        total = sum(weights.values()) or 1
        mixture = ", ".join(f"{source} {weight / total:.0%}" for source, weight in weights.items())
        ramp = f", reached over {stage['ramp_tokens']:,} tokens" if stage.get("ramp_tokens") else ""
        rows.append((stage["name"], f"{stage['tokens']:,}", f"{stage['batch_tokens']:,}", mixture + ramp))
    lines = ["Trained from scratch with tinyllama_jax on next-token prediction, in these stages as planned:"]
    if fork := config.get("fork"):
        lines = [
            f"Continued from the run `{Path(str(fork['run'])).name}` at {fork['tokens']:,} tokens, in these stages:"
        ]
    if start := config.get("start"):
        lines = [f"Fine-tuned{_beside(meta, config)} from `{name_of(Path(start['checkpoint']))}`, in these stages:"]
    planned = sum(stage["tokens"] for stage in config.get("curriculum") or [])
    facts = []
    if planned and meta.get("tokens", 0) < planned:
        facts.append(f"**This checkpoint is not the end of the run**: {meta['tokens']:,} of {planned:,} tokens.")
    facts.append(_optimizer(_dictionary(config.get("optimizer")), _dictionary(config.get("lr"))))
    data = _dictionary(config.get("data"))
    masked = "documents do not see each other" if data.get("document_masking") else "documents see those before"
    facts.append(f"sequences of {data.get('sequence_tokens', '?')} tokens, in which {masked}; they {_marks(meta)}")
    dtype = _dictionary(config.get("model")).get("compute_dtype", "?")
    facts.append(f"{dtype} computation with float32 weights and optimizer state; seed {config.get('seed', '?')}")
    facts.append(f"{meta.get('tokens', 0) / flops.parameter_counts(model)['total']:.3g} tokens for each parameter")
    info = run.info if run else {}
    if device := _dictionary(info.get("devices")):
        facts.append(f"{device.get('count')} x {device.get('kind')}")
    if versions := _dictionary(meta.get("versions") or info.get("versions")):
        facts.append(", ".join(f"{package} {version}" for package, version in versions.items() if version))
    facts.append(
        f"configuration `{meta.get('fingerprint', '?')}`" + (f", code `{info['git']}`" if info.get("git") else "")
    )
    table = _table(("stage", "tokens", "tokens in a batch", "mixture, in tokens"), rows)
    return "\n\n".join([*lines, table, "\n".join(f"- {fact}" for fact in facts)])


def _beside(meta: dict, config: dict) -> str:
    adapter = _dictionary(_dictionary(meta.get("merged")).get("adapter") or config.get("adapter"))
    if not adapter:
        return ""
    if adapter.get("method") == "prefix":
        return f" with a prefix of {adapter.get('prefix_tokens')} tokens"
    how = f"rank {adapter.get('rank')}, alpha {adapter.get('alpha'):g}, base in {adapter.get('base_weights')}"
    return f" with LoRA ({how}) of {', '.join(adapter.get('targets') or [])}"


def _optimizer(optimizer: dict, lr: dict) -> str:
    ends = f" to {lr['end']:g}" if lr.get("kind") not in ("constant", "piecewise") and "end" in lr else ""
    warmup = f" after {lr['warmup_tokens']:,} tokens of warm-up" if lr.get("warmup_tokens") else ""
    rate = f"{lr.get('kind', '?')} learning rate, {lr.get('peak', math.nan):g}{ends}{warmup}"
    if optimizer.get("kind") == "rmsprop":
        kind = f"RMSprop (smoothing {optimizer.get('beta2')}"
    else:
        kind = f"AdamW (betas {optimizer.get('beta1')}, {optimizer.get('beta2')}"
    decay, clip = optimizer.get("weight_decay"), optimizer.get("clip_norm")
    return f"{kind}, weight decay {decay}, gradients clipped to {clip}); {rate}"


def _data(meta: dict, manifest: dict, sources: list[str]) -> str:
    tokens = _dictionary(_dictionary(meta.get("store")).get("train_tokens"))
    if not tokens:
        return "What it was trained on is not recorded."
    splits = _dictionary(_dictionary(manifest.get("splits")).get("train"))
    rows = [
        (domain, f"{count:,}", f"{splits[domain]['documents']:,}" if domain in splits else "not recorded")
        for domain, count in tokens.items()
    ]
    text = [_table(("source", "unique training tokens", "documents"), rows)]
    if not manifest:
        return "\n\n".join([*text, "The token store was not found when this was written; no more is known of it."])
    named = [
        f"{domain}: `{name}`" + (f" (layout {layout})" if layout else "")
        for domain, layout, name in map(_source, sources)
    ]
    text.append("\n".join(f"- {line}" for line in named))
    recipe = _dictionary(manifest.get("recipe"))
    filters = ", ".join(f"`{rule}`" for rule in recipe.get("filters") or []) or "none"
    tokenizer = _dictionary(manifest.get("tokenizer"))
    origin = "given" if recipe.get("tokenizer") else "trained on this text"
    text.append(f"Filters: {filters}.  Tokenizer: {tokenizer.get('vocab_size', 0):,} ids, {origin}.")
    return "\n\n".join(text)


def _source(spec: str) -> tuple[str, str, str]:
    """(domain, layout, last part of the path) of a source as `prepare` takes it: [DOMAIN=][LAYOUT:]PATH[?options]."""
    domain, equals, rest = spec.partition("=") if "=" in spec.split("?")[0] else ("", "", spec)
    layout, colon, path = rest.partition(":")
    if not colon or "/" in layout:
        layout, path = "", rest
    name = PurePosixPath(path.split("?")[0]).name or path
    return (domain if equals else layout or name), layout, name


def _evaluation(meta: dict, run: Run | None) -> str:
    parts = []
    step = meta.get("step", 0)
    if run and (rows := _validation(run, step)):
        table = _table(("held-out text", "loss, nats per token", "bits per byte", "after step"), rows)
        parts.append(f"On text of the same sources that was not trained on:\n\n{table}")
    results = _results(run, step) if run else []
    if results:
        harness = results[0][0].get("harness")
        rows = [
            (task, str(r.get("shots", "")), str(r.get("metric", "")), _plus_minus(r.get("value"), r.get("stderr")))
            for value, task, r in results
        ]
        table = _table(("task", "examples shown", "metric", "value"), rows)
        parts.append(f"By lm-evaluation-harness{f' {harness}' if harness else ''}, of this checkpoint:\n\n{table}")
    else:
        parts.append("No evaluation on downstream tasks was made of this checkpoint.")
    return "\n\n".join(parts)


def _validation(run: Run, step: int) -> list[tuple[str, ...]]:
    """(domain, loss, bits per byte, step) of the last validation up to `step`."""
    steps, rows = run.column("step", "validation"), []
    for domain in run.domains:
        loss, bits = (run.column(f"domains.{domain}.{what}", "validation") for what in ("loss", "bits_per_byte"))
        known = [i for i in range(len(steps)) if steps[i] <= step and not math.isnan(loss[i])]
        if known:
            at = known[-1]
            rows.append((domain, f"{loss[at]:.4f}", f"{bits[at]:.4f}" if bits[at] > 0 else "", f"{int(steps[at]):,}"))
    return rows


def _results(run: Run, step: int) -> list[tuple[dict, str, dict]]:
    """(file's contents, task, result) of RUN/evaluations/*.json for exactly this step; other shapes are passed over."""
    found = []
    for path in sorted((run.directory / "evaluations").glob("*.json")):
        try:
            value = _dictionary(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
        results = _dictionary(value.get("results")) if value.get("step") == step else {}
        found += [(value, str(task), r) for task, r in results.items() if isinstance(r, dict) and "value" in r]
    return found


def _plus_minus(value: Any, error: Any) -> str:
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, (int, float)) else "")


def _limits(meta: dict, run: Run | None, model: Model, language: str) -> str:
    total = flops.parameter_counts(model)["total"]
    seen = _dictionary(_dictionary(meta.get("config")).get("data")).get("sequence_tokens", model.context_tokens)
    taught = (
        "It continues text.  It was not taught to follow instructions or to refuse anything, and nothing was done to"
    )
    if _dictionary(_dictionary(meta.get("config")).get("data")).get("examples"):
        taught = (
            "It was tuned on examples of answers, and is as right and as polite as these.  Nothing else was done to"
        )
    lines = [
        f"{taught} align it: what it writes may be false, offensive or harmful.",
        f"It is small ({total / 1e6:.3g} million parameters): it knows little, reasons little, and repeats itself.",
        "It has the biases and errors of its data, and may reproduce parts of it.",
        f"It has seen no more than {seen:,} tokens at once; beyond that, expect nothing.",
        "Its languages are "
        + (f"{language}; of others it knows little." if language else "not stated; they are those of its data."),
    ]
    if repeated := _repeated(run, meta.get("step", 0)):
        said = ", ".join(f"{source} {epochs:.1f} times" for source, epochs in repeated)
        lines.append(
            f"Data was repeated: {said}.  Repetition teaches less each time and makes memorised text more likely."
        )
    return "\n".join(f"- {line}" for line in lines)


def _repeated(run: Run | None, step: int) -> list[tuple[str, float]]:
    """(source, epochs) of those that were seen more than once by `step`."""
    if run is None:
        return []
    before = run.column("step") <= step
    seen = ((source, run.column(f"epoch.{source}")[before]) for source in run.sources)
    return [(source, float(epochs[-1])) for source, epochs in seen if len(epochs) and epochs[-1] > 1]


def _manifest(meta: dict) -> dict:
    """The manifest of the store that a checkpoint was trained on, if it is still where it was and the same."""
    import hashlib

    store = _dictionary(meta.get("store"))
    try:
        data = (Path(store["path"]) / "manifest.json").read_bytes()
        same = store.get("manifest_sha256") in (None, hashlib.sha256(data).hexdigest())
        return _dictionary(json.loads(data)) if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _marks(meta: dict) -> str:
    known = {"eos": "end with EOS", "bos": "begin with BOS", "both": "begin with BOS and end with EOS"}
    return known.get(str(meta.get("document_marks")), "carry no mark")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
