"""The options of `import` and `export`."""

from __future__ import annotations

from tinyllama_jax import verbs_interop
from tinyllama_jax.interop import formats


def add_interop(verb, as_json) -> None:
    sub = verb(
        "import",
        verbs_interop.import_,
        "make a checkpoint from another format",
        "tinyllama import hf DIR --out ckpt\n  tinyllama import gguf model.gguf --out ckpt\n"
        "  tinyllama import peft ADAPTER --base ckpt --out tuned",
    )
    sub.add_argument("format", choices=formats.readable(), help=_described(formats.readable()))
    sub.add_argument("source", metavar="PATH", help="the folder of the foreign model, or its file")
    sub.add_argument("--out", required=True, metavar="CKPT")
    sub.add_argument("--context-tokens", type=int, metavar="N", help="meta: of the model (2048), params.json has none")
    sub.add_argument("--base", metavar="CKPT", help="peft: the checkpoint of the model that the adapter belongs to")
    as_json(sub)

    sub = verb(
        "export",
        verbs_interop.export,
        "write a checkpoint in another format",
        "tinyllama export hf runs/demo --out hf\n  tinyllama export gguf runs/demo --out demo.gguf --dtype Q8_0\n"
        "  tinyllama export peft runs/lora@best --out adapter --base-model hf\n\n"
        "A run with LoRA is exported merged, but by peft.  A base that was frozen in int8, int4 or nf4 is then the\n"
        "dequantised one, so that the model computes what was trained.",
    )
    sub.add_argument("format", choices=formats.writable(), help=_described(formats.writable()))
    sub.add_argument("checkpoint", metavar="CKPT")
    sub.add_argument("--out", required=True, metavar="DIR|FILE")
    known = "; ".join(f"{name}: {', '.join(formats.FORMATS[name].dtypes)}" for name in formats.writable())
    sub.add_argument("--dtype", help=f"how the weights are stored (the first of {known})")
    sub.add_argument("--shard-size", metavar="N", help="hf: begin another weight file above it, such as 2GB (5GB)")
    sub.add_argument(
        "--layout",
        choices=("tinyllama", "litgpt"),
        help="litgpt: tinyllama is that of the TinyLlama repository (litgpt)",
    )
    sub.add_argument(
        "--base-model", metavar="NAME", help="peft: the base's folder or its name on the Hub (its run's name)"
    )
    sub.add_argument("--license", metavar="ID", help="hf, peft: of the model card, such as apache-2.0 (unstated)")
    sub.add_argument("--language", metavar="CODES", help="hf, peft: of the model card, such as en,zh (unstated)")
    as_json(sub)


def _described(names: list[str]) -> str:
    return "; ".join(f"{name}: {formats.FORMATS[name].what}" for name in names)
