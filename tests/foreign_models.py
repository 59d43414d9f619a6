"""Tokenizers as other people publish them beside a Llama: byte-level pieces, special tokens, a chat template."""

import json
import os
from pathlib import Path

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
GENERATION = {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 2, "temperature": 0.6, "do_sample": True}
SOURCE = Path(os.__file__).read_text(encoding="utf-8")
TEXTS = (
    "",
    " ",
    "a",
    "Once upon a time",
    "  two  spaces ",
    "\tdef f(x):\n        return x\n",
    "naïve 日本語 🎉",
    "12345 67",
)
TEXTS += tuple(SOURCE[at : at + 200] for at in range(0, 10_000, 1000))


def write_tokenizer(folder: Path, *, post_processor: str = "none", bos: str = "<|im_start|>", **config) -> Path:
    """tokenizer.json and what lies beside it.  post_processor: none, byte_level (which adds nothing) or bos."""
    import tokenizers as tk

    folder.mkdir(parents=True, exist_ok=True)
    made = tk.Tokenizer(tk.models.BPE())
    digits, level = (
        tk.pre_tokenizers.Digits(individual_digits=True),
        tk.pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    made.pre_tokenizer = tk.pre_tokenizers.Sequence([digits, level])
    made.decoder = tk.decoders.ByteLevel()
    made.train_from_iterator(
        [SOURCE],
        tk.trainers.BpeTrainer(
            vocab_size=500, special_tokens=list(SPECIAL), initial_alphabet=level.alphabet(), show_progress=False
        ),
    )
    if post_processor == "byte_level":
        made.post_processor = tk.processors.ByteLevel(trim_offsets=True)
    elif post_processor == "bos":
        made.post_processor = tk.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, SPECIAL.index(bos))]
        )
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": bos, "eos_token": "<|im_end|>", "unk_token": SPECIAL[0], "pad_token": "<|im_end|>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": 8192}
    files = {
        "tokenizer_config.json": named | settings | {"chat_template": CHAT} | config,
        "special_tokens_map.json": named | {"additional_special_tokens": list(SPECIAL[1:])},
        "generation_config.json": GENERATION,
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder
