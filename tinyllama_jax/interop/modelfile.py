"""What Ollama and llama.cpp want to be told to run an exported file: a Modelfile and a command line.

Ollama's templates are in another language than Hugging Face's, so only two are written: Zephyr's, of TinyLlama-Chat
1.0, and ChatML.  With any other Ollama falls back on what it makes of the template inside the file.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from tinyllama_jax.errors import ConfigError

TEMPERATURE = 0.7  # what TinyLlama-Chat's model card samples with

# Name -> (in a chat template of this kind, not in one, Ollama's template for an end-of-text token, where answers stop)
TEMPLATES = {
    "chatml": (
        ("<|im_start|>", "<|im_end|>"),
        (),
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n{{ .Response }}<|im_end|>\n",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "zephyr": (
        ("<|user|>", "<|assistant|>", "eos_token"),
        ("<|end|>", "[INST]"),  # of Phi 3 and others with the same roles
        "{{ if .System }}<|system|>\n{{ .System }}EOS\n{{ end }}"
        "{{ if .Prompt }}<|user|>\n{{ .Prompt }}EOS\n{{ end }}"
        "<|assistant|>\n{{ .Response }}EOS\n",
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
}


def kind_of(chat_template: str) -> str:
    """zephyr, chatml, `none` for an empty template, or `other`."""
    for name, (present, absent, *_) in TEMPLATES.items():
        if all(mark in chat_template for mark in present) and not any(mark in chat_template for mark in absent):
            return name
    return "other" if chat_template else "none"


def modelfile(file: Path, context_tokens: int, chat_template: str, eos: str) -> str:
    """The Modelfile for a file beside it."""
    kind, lines = kind_of(chat_template), [f"FROM ./{file.name}"]
    stops = [eos] if eos else []
    if kind in TEMPLATES:
        *_, template, more = TEMPLATES[kind]
        lines.append(f'TEMPLATE """{template.replace("EOS", eos)}"""')
        stops += [stop for stop in more if stop != eos]
    elif kind == "none":  # a base model goes on with the text itself
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER temperature {TEMPERATURE}", f"PARAMETER num_ctx {context_tokens}"]
    return "\n".join(lines) + "\n"


def command(file: Path, context_tokens: int, chat_template: str) -> str:
    """How llama.cpp runs the file: `llama-cli` talks, `llama-completion` goes on with a text."""
    words = ["-m", str(file), "-c", str(context_tokens), "--temp", str(TEMPERATURE)]
    if chat_template:
        return shlex.join(["llama-cli", *words])
    return shlex.join(["llama-completion", *words, "-no-cnv", "-n", "64", "-p", "Once upon a time"])


def create(place: Path, file: Path) -> str:
    """How Ollama takes the file in, under its name without the ending."""
    return shlex.join(["ollama", "create", file.stem.lower(), "-f", str(place)])


def place_for(file: Path) -> Path:
    """`Modelfile` beside a file, or with the file's name before it when that is taken.  Raises ConfigError."""
    choices = (file.with_name("Modelfile"), file.with_name(f"{file.name}.Modelfile"))
    place = next((path for path in choices if not path.exists()), None)
    if place is None:
        raise ConfigError(f"{choices[0]} and {choices[1]} exist already; remove one, or export into another folder")
    return place
