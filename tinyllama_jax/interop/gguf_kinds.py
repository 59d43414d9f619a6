"""Which tensor of a GGUF file is stored how, and how many bytes that is.

As llama.cpp's converter and quantiser do it: norms stay F32; a quantised file keeps the matrix of the logits (the
embedding, where the two are tied) at Q6_K, or at Q8_0 where its rows are no multiple of 256; and what a kind's blocks
do not divide is F16.  The package `gguf` quantises no K-quant, so Q6_K is quantised here.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tinyllama_jax.config import Model
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.interop.gguf_file import block
from tinyllama_jax.interop.gguf_model import gguf_name
from tinyllama_jax.interop.hf import hf_shapes

# What can be written -> its number in general.file_type (llama.cpp's llama_ftype).
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9}
QUANTISED = tuple(kind for kind in FILE_TYPES if kind.startswith("Q"))


def kinds(model: Model, kind: str) -> dict[str, str]:
    """Hugging Face's name -> how a file of `kind` stores that tensor."""
    head = "model.embed_tokens.weight" if model.tied_embeddings else "lm_head.weight"
    found = {}
    for name, shape in hf_shapes(model).items():
        wanted = "Q6_K" if name == head and kind in QUANTISED and kind != "Q8_0" else kind
        choices = (wanted, "Q8_0", "F16") if wanted == "Q6_K" else (wanted, "F16")
        fitting = next(k for k in choices if shape[-1] % block(k)[0] == 0)
        found[name] = "F32" if len(shape) == 1 else fitting
    return found


def fallbacks(model: Model, kind: str) -> list[str]:
    """A line for each shape of matrices that a file of `kind` has to keep at F16."""
    lines: dict[int, list[str]] = {}
    for name, stored in kinds(model, kind).items():
        if stored == "F16" and kind in QUANTISED:
            lines.setdefault(hf_shapes(model)[name][-1], []).append(gguf_name(name))
    return [
        f"{len(names)} tensors stay F16, for {kind}'s blocks of 32 do not divide their rows of {values}: {_few(names)}"
        for values, names in lines.items()
    ]


def _few(names: list[str]) -> str:
    return ", ".join(names[:2]) + (" and so on" if len(names) > 2 else "")


def data_bytes(model: Model, kind: str, alignment: int = 32) -> int:
    """Bytes of all tensors in a file, without the header."""
    shapes = hf_shapes(model)
    return sum(-(-tensor_bytes(shapes[n], k) // alignment) * alignment for n, k in kinds(model, kind).items())


def tensor_bytes(shape: Iterable[int], kind: str) -> int:
    values, n_bytes = block(kind)
    size = 1
    for axis in shape:
        size *= axis
    return size // values * n_bytes


def quantise(name: str, tensor: np.ndarray, kind: str) -> np.ndarray:
    """A matrix or vector as a file stores it: float32, float16, or bytes.

    Raises ConfigError for values that the kind cannot hold: too large for float16, or, quantised, not finite.
    """
    import gguf

    tensor = np.ascontiguousarray(tensor, np.float32)
    if kind == "F32":
        return tensor
    if kind != "BF16":
        finite = np.isfinite(tensor)
        largest = max(tensor.max(initial=0, where=finite), -tensor.min(initial=0, where=finite))
        if largest > np.finfo(np.float16).max:
            raise ConfigError(f"{name} holds {largest:.3g}, too large for {kind}; export BF16 or F32")
        if kind != "F16" and not finite.all():
            raise ConfigError(f"{name} holds values that are not finite; export F16, BF16 or F32")
    if kind == "Q6_K":
        return _q6_k(tensor)
    return gguf.quants.quantize(tensor, gguf.GGMLQuantizationType[kind])


def _q6_k(tensor: np.ndarray) -> np.ndarray:
    """Q6_K: 256 values as 6-bit integers, a signed 8-bit scale for each 16, a float16 scale for all (ggml-common.h).

    Each 16 are scaled by their value of largest magnitude, which becomes -32.  llama.cpp tries a few scales around
    that one and keeps the best; the format is the same, the error a little larger here.
    """
    rows = [_q6_k_rows(part) for part in np.array_split(tensor, max(len(tensor) // 256, 1))]
    return np.concatenate(rows)


def _q6_k_rows(rows: np.ndarray) -> np.ndarray:
    x_BGV = rows.reshape(-1, 16, 16)
    widest = np.take_along_axis(x_BGV, np.abs(x_BGV).argmax(-1, keepdims=True), -1)[..., 0]
    scale_BG = widest / np.float32(-32)
    largest = np.take_along_axis(scale_BG, np.abs(scale_BG).argmax(-1, keepdims=True), -1)
    d_B1 = (largest / np.float32(-128)).astype(np.float16)
    d = d_B1.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.where(d == 0, 0, np.rint(scale_BG / d)).clip(-128, 127).astype(np.int8)
        step = d[..., None] * scales[..., None]
        q = np.where(step == 0, 0, np.rint(x_BGV / step)).clip(-32, 31).astype(np.int8) + 32
    q = q.astype(np.uint8).reshape(-1, 2, 4, 32)  # two halves of four runs of 32
    low, high = q & 15, q >> 4
    ql = low[:, :, :2] | low[:, :, 2:] << 4
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = [ql.reshape(-1, 128), qh.reshape(-1, 64), scales.view(np.uint8), d_B1.view(np.uint8)]
    return np.concatenate(parts, axis=-1).reshape(len(rows), -1)
