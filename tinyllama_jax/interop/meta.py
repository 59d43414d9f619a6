"""Meta's original Llama folders (consolidated.NN.pth, params.json) <-> a `Model` and its parameters.

Two things differ from Hugging Face's layout, through which the tensors pass (hf.py), besides the names:

RoPE pairs neighbours: Meta's code turns dimensions 2i and 2i + 1 of a head together, ours i and i + K / 2.  So the rows
of query and key matrices are permuted within each head, and every product of a query and a key stays what it was.
Model-parallel checkpoints are cut: each of N files has an N-th of the rows or the columns of every matrix.

Fields and names: llama/model.py of github.com/meta-llama/llama, models/llama3 of github.com/meta-llama/llama-models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax.config import Model, Rope, replace
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop import hf, torch_files
from tinyllama_jax.interop.hf_config import short, value_of
from tinyllama_jax.interop.json_files import read_json, write_json
from tinyllama_jax.interop.litgpt import same
from tinyllama_jax.interop.new_folder import new_folder
from tinyllama_jax.interop.tensor_files import Shape

PARAMS, WEIGHTS = "params.json", "consolidated.{:02d}.pth"
CONTEXT_TOKENS = 2048  # of ModelArgs, for params.json says nothing of it
TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
COLUMNS = ("attention.wo", "feed_forward.w2")  # cut along columns; the embedding too, before Llama 3
KNOWN = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
KNOWN |= {"rope_theta", "max_seq_len", "max_batch_size", "model_parallel_size"}
KNOWN |= {"use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor"}


def _name(hf_name: str) -> str:
    stem = hf_name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    _, _, layer, below = stem.split(".", 3)  # model.layers.N.
    return f"layers.{layer}.{LAYER[below]}.weight"


def halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads K, D] whose RoPE pairs are neighbours -> the same rows with pairs half a head apart."""
    return matrix.reshape(heads, -1, 2, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)


def neighbours(matrix: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `halves`."""
    return matrix.reshape(heads, 2, -1, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)


def _heads(name: str, model: Model) -> int:
    """How many heads' rows are to be permuted; 0 for matrices without RoPE."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    return {"q_proj": model.heads, "k_proj": model.kv_heads}.get(kind, 0)


def hidden(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The width of the MLP that Meta's code computes: 2/3 of 4 dim, times the multiplier, up to a multiple."""
    width = int(2 * (4 * dim) / 3)
    width = width if multiplier is None else int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def multiple_and_multiplier(dim: int, d_ff: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) with which `hidden` gives d_ff; the simplest there are."""
    multiples = [2**n for n in range(8, -1, -1) if d_ff % 2**n == 0]
    width = int(2 * (4 * dim) / 3)
    multipliers = [None, *(round(d_ff / width, digits) for digits in range(1, 7)), d_ff / width, (d_ff + 0.5) / width]
    return next((n, m) for m in multipliers for n in multiples if hidden(dim, n, m) == d_ff)


def model_from_params(config: dict[str, Any], shapes: Mapping[str, Shape], context_tokens: int, where: Path) -> Model:
    """The `Model` of a params.json whose tensors have `shapes`, joined.  Raises ConfigError and DataError."""
    for key in sorted(config.keys() - KNOWN):
        if config[key]:
            raise ConfigError(f"{where}: {short(key)}={short(config[key])} cannot be represented by a Llama here")

    def number(key: str, default: Any) -> Any:
        return value_of(config, key, default, where)

    dim, heads = number("dim", int), number("n_heads", int)
    if dim % heads:
        raise ConfigError(f"{where}: dim={dim} is no multiple of n_heads={heads}")
    embedding, gate = shapes.get("tok_embeddings.weight", ()), shapes.get("layers.0.feed_forward.w1.weight", ())
    if len(embedding) != 2 or len(gate) != 2:
        raise DataError(f"{where.parent} holds no Llama of Meta's: tok_embeddings or the first layer's w1 is no matrix")
    vocab_size = None if config.get("vocab_size") == -1 else config.get("vocab_size")
    vocab_size = value_of({"vocab_size": vocab_size}, "vocab_size", embedding[0], where)
    multiplier = number("ffn_dim_multiplier", 0.0) or None
    d_ff = hidden(dim, number("multiple_of", 256), multiplier)
    if gate[0] != d_ff:
        raise DataError(f"{where}: multiple_of and ffn_dim_multiplier make an MLP of {d_ff}; w1 has {gate[0]} rows")
    rope = Rope(theta=number("rope_theta", 10_000.0))
    if config.get("use_scaled_rope"):
        factor, high = number("rope_scaling_factor", 8.0), number("rope_high_freq_factor", 4.0)
        rope = Rope(kind="llama3", theta=rope.theta, factor=factor, high_freq_factor=high, original_context_tokens=8192)
    try:
        return Model(
            vocab_size=vocab_size,
            d_model=dim,
            layers=number("n_layers", int),
            heads=heads,
            kv_heads=number("n_kv_heads", heads),
            head_dim=dim // heads,
            d_ff=d_ff,
            context_tokens=context_tokens,
            norm_eps=number("norm_eps", 1e-5),
            rope=rope,
        )
    except ConfigError as error:
        raise error if str(where) in str(error) else ConfigError(f"{where}: {error}") from None


def params_for(model: Model) -> dict[str, Any]:
    """params.json for `model`.  Raises ConfigError for what Meta's code does not compute."""
    rope = model.rope
    scaled = Rope(kind="llama3", theta=rope.theta, factor=8.0, original_context_tokens=8192)
    if rope.kind != "default" and rope != scaled:
        raise ConfigError(
            f"model.rope.kind={rope.kind} cannot be exported as meta: it has default RoPE and Llama 3.1's"
        )
    if model.heads * model.head_dim != model.d_model:
        raise ConfigError(f"model.head_dim={model.head_dim} cannot be exported as meta: it must be d_model / heads")
    multiple_of, multiplier = multiple_and_multiplier(model.d_model, model.d_ff)
    return {
        "dim": model.d_model,
        "n_layers": model.layers,
        "n_heads": model.heads,
        "n_kv_heads": model.kv_heads,
        "vocab_size": model.vocab_size,
        "multiple_of": multiple_of,
        **({} if multiplier is None else {"ffn_dim_multiplier": multiplier}),
        "norm_eps": model.norm_eps,
        "rope_theta": rope.theta,
        **({"use_scaled_rope": True} if rope.kind == "llama3" else {}),
    }


class Joined:
    """The tensors of N model-parallel files as if they were one: `shapes` by name, and `read(name)`."""

    def __init__(self, shards: Sequence[Mapping[str, np.ndarray]], dim: int, where: Path):
        self._shards, self._axes = shards, {}
        self.shapes: dict[str, Shape] = {}
        for name, first in shards[0].items():
            shapes = [shard[name].shape for shard in shards if name in shard]
            if len(shapes) < len(shards) or len({(len(shape), *shape) for shape in shapes}) > 1:
                raise DataError(f"{where}: tensor {name} is not in every file, or differs in shape; copy them again")
            axis = self._axis(name, first.shape, dim)
            self._axes[name] = axis
            self.shapes[name] = tuple(n * len(shards) if i == axis else n for i, n in enumerate(first.shape))

    def _axis(self, name: str, shape: Shape, dim: int) -> int | None:
        """The axis that was cut; None for what every file has whole."""
        if len(self._shards) == 1 or len(shape) != 2:
            return None
        if name == "tok_embeddings.weight":
            return 0 if shape[1] == dim else 1
        return 1 if name.removesuffix(".weight").endswith(COLUMNS) else 0

    def read(self, name: str) -> np.ndarray:
        parts = [shard[name] for shard in self._shards]
        return parts[0] if self._axes[name] is None else np.concatenate(parts, axis=self._axes[name])


def from_state(shards: Sequence[Mapping[str, np.ndarray]], config: dict, context_tokens: int, where: Path):
    """(model, parameters) of the files' state_dicts; tied where there is no output or it equals the embedding.

    where: the params.json.  Raises DataError and ConfigError.
    """
    joined = Joined(shards, value_of(config, "dim", int, where), where.parent)
    model = model_from_params(config, joined.shapes, context_tokens, where)
    hf.require_layers(model, joined.shapes, where)
    output, table = "output.weight", "tok_embeddings.weight"
    tied = output not in joined.shapes or same(joined.read(output), joined.read(table))
    model = replace(model, tied_embeddings=tied)
    expected = {_name(name): shape for name, shape in hf.hf_shapes(model).items()}
    if tied and output in joined.shapes:
        expected[output] = expected[table]
    torch_files.require_exactly(joined.shapes, expected, where.parent, "rope.freqs")

    def read(name: str) -> np.ndarray:
        tensor, heads = joined.read(_name(name)), _heads(name, model)
        return halves(tensor, heads) if heads else tensor

    return model, hf.assemble(model, read)


def to_state(params: hf.Params, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) in Meta's layout; a tied model has its embedding as output too, for Meta's code ties nothing."""
    for name, tensor in hf.hf_tensors(params, model):
        heads = _heads(name, model)
        yield _name(name), neighbours(tensor, heads) if heads else tensor
        if model.tied_embeddings and name == "model.embed_tokens.weight":
            yield "output.weight", tensor


def read_meta(source: Path, context_tokens: int | None = None) -> tuple[Model, hf.Params, list[str]]:
    """(model, parameters, lines for the user) of a folder with params.json and consolidated.00.pth and on.

    context_tokens: what the model was trained for; 2048 where neither this nor params.json says it.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; give the one that holds {PARAMS} and {WEIGHTS.format(0)}")
    config = read_json(source / PARAMS)
    files = sorted(path for path in source.glob("consolidated.*.pth") if re.fullmatch(r"\d\d", path.name[13:-4]))
    if [path.name for path in files] != [WEIGHTS.format(number) for number in range(len(files))] or not files:
        names = ", ".join(path.name for path in files[:4]) or "none"
        raise DataError(f"{source} needs {WEIGHTS.format(0)} and those that follow it, without a gap; found {names}")
    notes = []
    if context_tokens is None:
        context_tokens = value_of(config, "max_seq_len", CONTEXT_TOKENS, source / PARAMS)
        if config.get("max_seq_len") is None:
            notes = [
                f"{source / PARAMS} does not say the context: {context_tokens} tokens; --context-tokens changes it"
            ]
    return *from_state([torch_files.load(path) for path in files], config, context_tokens, source / PARAMS), notes


def write_meta(params: hf.Params, model: Model, directory: Path, *, dtype: str, files: list[Path]) -> None:
    """Write params.json, consolidated.00.pth and, where there is one, tokenizer.model.

    The folder appears when it is complete.  Raises ConfigError when it holds something, or for RoPE that Meta's code
    does not compute.
    """
    config = params_for(model)
    with new_folder(directory) as unfinished:
        torch_files.save(unfinished / WEIGHTS.format(0), to_state(params, model), dtype)
        write_json(unfinished / PARAMS, config)
        for file in files:
            if file.name == "tokenizer.model":
                (unfinished / file.name).write_bytes(file.read_bytes())
