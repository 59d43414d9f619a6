"""The options of `import` and `export`."""

from __future__ import annotations

from tinyllama_jax import verbs_interop


def add_interop(verb, as_json) -> None:
    sub = verb(
        "import", verbs_interop.import_, "make a checkpoint from another format", "tinyllama import hf DIR --out ckpt"
    )
    sub.add_argument("format", choices=("hf",), help="hf: Hugging Face safetensors and config.json")
    sub.add_argument("source", metavar="DIR")
    sub.add_argument("--out", required=True, metavar="CKPT")
    as_json(sub)

    sub = verb(
        "export", verbs_interop.export, "write a checkpoint in another format", "tinyllama export hf runs/demo --out hf"
    )
    sub.add_argument("format", choices=("hf",), help="hf: Hugging Face safetensors and config.json")
    sub.add_argument("checkpoint", metavar="CKPT")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="(float32)")
    as_json(sub)
