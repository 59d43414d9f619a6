"""The model behind a cache of keys and values: a prompt at once, then a few tokens of each row at a time.

The cache is a tuple over the layers of {"k", "v"}, each [B, G, S, K].  Arrays apart are written in place where one
array would be copied through a loop over layers, so layers are unrolled.  With the slots of a head in one piece, scores
and weighted sums are products without a transpose: twice as fast on a CPU.

Parameters are those of transformer.py, or what `quantized.serving` makes of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from tinyllama_jax import attention, sharding
from tinyllama_jax.config import Execution, Model
from tinyllama_jax.model import prefix, quantized, rope, transformer
from tinyllama_jax.model.layers import rms_norm
from tinyllama_jax.model.transformer import Params

Cache = tuple[dict[str, jax.Array], ...]


def init_cache(cfg: Model, batch: int, slots: int, batch_axes: sharding.BatchAxes = None) -> Cache:
    """An empty cache for `batch` rows of at most `slots` tokens, in the compute dtype; heads lie over `tensor`.

    batch_axes: the mesh axes over which the tokens' rows lie: `sharding.batch_axes(tokens_BT)`.
    """
    shape, spec = (batch, cfg.kv_heads, slots, cfg.head_dim), _spec(batch_axes)
    make = lambda: jnp.zeros(shape, cfg.compute_dtype, out_sharding=spec)  # noqa: E731
    return tuple({"k": make(), "v": make()} for _ in range(cfg.layers))


def _spec(rows: sharding.BatchAxes) -> P:
    return P(rows, sharding.TENSOR if sharding.parts(sharding.TENSOR) > 1 else None, None, None)


def prefill(
    params: Params, tokens_BT: jax.Array, cfg: Model, execution: Execution, last_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits float32 [B, V] behind token last_B of each row, and a cache of T slots with all of them in it.

    With a prefix of P (prefix.py) it has P + T slots, the prefix in the first, and the next token's position is P + T.
    Shorter prompts are aligned left: no token sees the padding behind it, and its slots are written over before they
    are read.
    """
    cos, sin = rope.tables(cfg, prefix.tokens(params) + jnp.arange(tokens_BT.shape[1]))
    kept: list[dict[str, jax.Array]] = []
    attend = functools.partial(attention.attention, implementation=execution.attention)

    def attend_in(before: dict[str, jax.Array] | None) -> Callable:
        def keeping(q_BTHK, k_BTGK, v_BTGK):
            of_layer = (k_BTGK, v_BTGK)
            if before is not None:
                of_layer = [
                    jnp.concatenate(p, axis=1) for p in zip(prefix.before(before, k_BTGK), of_layer, strict=True)
                ]
            kept.append(dict(zip("kv", (x.swapaxes(1, 2) for x in of_layer), strict=True)))
            return (attend if before is None else prefix.attending(attend, before))(q_BTHK, k_BTGK, v_BTGK)

        return keeping

    x_BTD = transformer.embed(params, tokens_BT, cfg)
    for layer, before in _layers(params, cfg):
        x_BTD = layer(x_BTD, cos, sin, attend_in(before))
    x_BD = jax.vmap(lambda row_TD, last: row_TD[last])(x_BTD, last_B)
    return _logits(params, x_BD[:, None], cfg)[:, 0], tuple(kept)


def decode(
    params: Params,
    tokens_BT: jax.Array,
    cfg: Model,
    cache: Cache,
    positions_BT: jax.Array,
    *,
    visible: int | None = None,
    slide: bool = False,
) -> tuple[jax.Array, Cache]:
    """Logits float32 [B, T, V] of T more tokens per row, and the cache with them in it.

    A token at position p is written to slot p and sees slots 0 .. p, so each row's earlier positions must have been
    written; rows may be of different lengths.  A position past the last slot is not written (rows without a request
    use it); the caller sees to it that real ones fit.  Positions count the slots that a prefix takes.

    visible: only so many slots are read; the caller sees to it that no real position lies beyond.
    slide: position p is written to slot p mod S and sees the last S tokens.  T must be 1 then.
    """
    rows = sharding.batch_axes(tokens_BT)
    positions_BT = jax.sharding.reshard(positions_BT, P(rows, None))
    slots = cache[0]["k"].shape[2]
    at_BT = positions_BT % slots if slide else positions_BT
    last_BT = jnp.minimum(positions_BT, slots - 1)
    cos, sin = rope.tables(cfg, positions_BT)
    spec = _spec(rows)
    new_spec = P(spec[0], None, spec[1], None)
    write = jax.vmap(lambda s_GSK, at_T, new_TGK: s_GSK.at[:, at_T].set(new_TGK.swapaxes(0, 1), mode="drop"))
    write = jax.shard_map(write, in_specs=(spec, P(rows, None), new_spec), out_specs=spec, check_vma=False)
    cache, updated = jax.sharding.reshard(cache, spec), []

    def attend_in(layer: dict[str, jax.Array]) -> Callable:
        def attend(q_BTHK, k_BTGK, v_BTGK):
            k_BGSK, v_BGSK = write(layer["k"], at_BT, k_BTGK), write(layer["v"], at_BT, v_BTGK)
            updated.append({"k": k_BGSK, "v": v_BGSK})
            return _attend(q_BTHK, k_BGSK[:, :, :visible], v_BGSK[:, :, :visible], last_BT)

        return attend

    x_BTD = transformer.embed(params, tokens_BT, cfg)
    for (layer, _), of_layer in zip(_layers(params, cfg), cache, strict=True):
        x_BTD = layer(x_BTD, cos, sin, attend_in(of_layer))
    return _logits(params, x_BTD, cfg), tuple(updated)


def _attend(q_BTHK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, last_BT: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, softmax in float32; query t of row b sees slots 0 .. last_BT[b, t]."""
    B, T, H, K = q_BTHK.shape
    G, S = k_BGSK.shape[1:3]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgrk,bgsk->bgrts", q_BTGRK, k_BGSK, preferred_element_type=jnp.float32) / math.sqrt(K)
    seen_BTS = jnp.arange(S) <= last_BT[:, :, None]
    scores = jnp.where(seen_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights_BGRTS = jax.nn.softmax(scores, axis=-1).astype(v_BGSK.dtype)
    return jnp.einsum("bgrts,bgsk->btgrk", weights_BGRTS, v_BGSK).reshape(B, T, H, K)


def _layers(params: Params, cfg: Model) -> Iterator[tuple[Callable, dict[str, jax.Array] | None]]:
    """The layers as functions, each with its weights whole in the compute dtype only while it is computed, and with
    the prefix before its tokens."""
    layers = params["layers"]
    for i in range(cfg.layers):
        of_layer = layers[i] if isinstance(layers, tuple) else jax.tree.map(lambda leaf, i=i: leaf[i], layers)
        of_layer, before = prefix.split(of_layer)
        yield nnx.merge(transformer.block(cfg), quantized.whole(of_layer, jnp.dtype(cfg.compute_dtype))), before


def _logits(params: Params, x_BTD: jax.Array, cfg: Model) -> jax.Array:
    x_BTD = rms_norm(x_BTD, params["norm"]["scale"], cfg.norm_eps)
    if "head" in params:
        params = params | {"head": quantized.whole(params["head"], x_BTD.dtype)}
    return transformer.project(params, x_BTD, cfg)
