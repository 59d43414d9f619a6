"""The language model as functions of a plain dict of parameters.

flax.nnx defines the layers and is split once: `lax.scan` runs over the stacked layers and merges one layer at a
time, so the step is ordinary `jax.jit` over a pytree and its host cost does not grow with the depth.

    params = {"embed": {"embedding" [V, D]},
              "layers": {"attention_norm": {"scale" [L, D]},
                         "attention": {"query" [L, D, H, K], "key" and "value" [L, D, G, K], "out" [L, H, K, D]},
                         "mlp_norm": {"scale" [L, D]},
                         "mlp": {"gate" and "up" [L, D, F], "down" [L, F, D]}},
              "norm": {"scale" [D]},
              "head": {"kernel" [D, V]}}                      absent with tied embeddings

Everything here runs under `jax.set_mesh` of a mesh from `sharding.make_mesh`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import checkpoint_policies as policies
from jax.sharding import PartitionSpec as P

from tinyllama_jax import attention, sharding
from tinyllama_jax.config import Execution, Model
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.model import prefix, rope
from tinyllama_jax.model.init import initializers
from tinyllama_jax.model.layers import Block, Weight, dropout, rms_norm, terms, whole

Params = dict[str, Any]


def init(cfg: Model, key: jax.Array) -> Params:
    """Fresh float32 weights.  `jax.jit(partial(init, cfg), out_shardings=...)` makes them sharded from the start."""
    make = initializers(cfg)
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    params = {
        "embed": {"embedding": make["embedding"](embed_key, (cfg.vocab_size, cfg.d_model))},
        "layers": jax.vmap(lambda k: nnx.to_pure_dict(nnx.state(Block(cfg, nnx.Rngs(k)))))(
            jax.random.split(layers_key, cfg.layers)
        ),
        "norm": {"scale": jnp.ones((cfg.d_model,), jnp.float32)},
    }
    if not cfg.tied_embeddings:
        params["head"] = {"kernel": make["head"](head_key, (cfg.d_model, cfg.vocab_size))}
    return params


def working(params: Params, cfg: Model, execution: Execution) -> Params:
    """The weights as the micro-batches of an optimizer step read them: `params` with the layers' matrices in the
    compute dtype, cast once for all micro-batches and both passes; unrolled layers are a tuple of dicts, not stacked.

    The gradients by such matrices are of that dtype: a product's result is rounded to it, as it is when each use casts.
    Embedding and head stay float32, for their gradients are sums in float32 (`embed`, loss.py), and so do norm scales.
    Where layers are unrolled, a gradient by the stacked array would be a sum of as many whole arrays, all but one layer
    of each zero.
    """
    dtype = jnp.dtype(cfg.compute_dtype)
    cast = lambda path, leaf: leaf if path[-1].key == "scale" else leaf.astype(dtype)  # noqa: E731
    layers = jax.tree_util.tree_map_with_path(cast, params["layers"])
    if not execution.scan_layers:
        layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(cfg.layers))
    return params | {"layers": layers}


def stacked(of_working: Params) -> Params:
    """A tree shaped like the result of `working`, such as its gradients, in the shape of the parameters."""
    layers = of_working["layers"]
    if isinstance(layers, tuple):
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return of_working | {"layers": layers}


@functools.cache
def block(cfg: Model) -> nnx.GraphDef:
    """What a layer is without its weights."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Block(cfg, nnx.Rngs(0))))
    return graphdef


def embed(params: Params, tokens_BT: jax.Array, cfg: Model) -> jax.Array:
    """Rows of the table, [B, T, D] in the compute dtype."""
    # The table is read in float32 and only the rows are cast: the gradients of a frequent token's many occurrences
    # are then summed in float32.
    # `tensor` does not split it here: a lookup in a part would end in a sum of activations over `tensor`.
    table_VD = jax.sharding.reshard(params["embed"]["embedding"], P(None, None))
    x_BTD = table_VD.at[tokens_BT].get(out_sharding=P(*jax.typeof(tokens_BT).sharding.spec, None))
    return x_BTD.astype(cfg.compute_dtype)


def _is_attention(primitive: Any, *args: Any, **params: Any) -> bool:
    """Whether a value is what the backward pass of an attention implementation reads besides q, k and v."""
    named = policies.save_only_these_names(attention.OUTPUT, attention.LSE)
    return named(primitive, *args, **params) or primitive.name.startswith(attention.CUDNN_FORWARD)


def _is_gather(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether a value is a weight that `sharding.gather` made whole: a reshard, or one with a transpose of its own."""
    inner = params.get("call_jaxpr")
    only = [] if inner is None else [eqn.primitive.name for eqn in getattr(inner, "jaxpr", inner).eqns]
    return primitive.name == "reshard" or only == ["reshard"]


def _remat(body: Callable, kind: str, prevent_cse: bool) -> Callable:
    """`body` under a policy that says which of its values the backward pass keeps; the rest it computes again."""
    dots = policies.dots_with_no_batch_dims_saveable  # products with weights, not attention scores
    policy = {
        "none": lambda *args, **params: not _is_gather(*args, **params),
        "full": policies.nothing_saveable,
        "save_dots": dots,
        "save_dots_and_attention": policies.save_from_both_policies(dots, _is_attention),
    }[kind]
    # Gathered weights are not kept under any policy, or FSDP would end the forward pass with a whole model per
    # device.  On one device there is nothing to gather.
    if kind == "none" and jax.sharding.get_abstract_mesh().size == 1:
        return body
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)


def hidden(
    params: Params,
    tokens_BT: jax.Array,
    cfg: Model,
    execution: Execution,
    *,
    documents_BT: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Final-normed hidden states [B, T, D] in the compute dtype.

    params: as `init` makes them, or their `working` copy.
    tokens_BT: in order; or, where the mesh's `context` splits them, `sharding.striped`, and so is the result.
    documents_BT: segment ids; tokens see only their own document.  Positions run on through the row: RoPE depends
    on differences only, so a document's result does not depend on where in the row it lies.
    dropout_key: training with `cfg.dropout` > 0; without a key nothing is dropped.
    """
    tokens_axis = sharding.token_axis(tokens_BT)
    ahead = prefix.tokens(params)
    if ahead and documents_BT is not None:
        raise ConfigError(
            "adapter.method=prefix stands before whole rows, of one document each: set data.document_masking=false, "
            "with one example to a row (examples.packing=single)"
        )
    positions_T = ahead + sharding.striped(np.arange(tokens_BT.shape[1]), sharding.parts(tokens_axis))
    cos, sin = jax.sharding.reshard(rope.tables(cfg, positions_T), P(tokens_axis, None))
    graphdef = block(cfg)
    seen = None if documents_BT is None else attention.ranges(documents_BT)  # once for all layers
    attend = functools.partial(attention.attention, documents=seen, implementation=execution.attention)
    if cfg.dropout == 0:
        dropout_key = None

    def body(x_BTD, layer_and_index):
        layer, index = layer_and_index
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        layer, before = prefix.split(layer)
        attend_here = attend if before is None else prefix.attending(attend, before)
        return nnx.merge(graphdef, layer)(x_BTD, cos, sin, attend_here, key), None

    # A loop's body cannot be merged with its own recomputation; unrolled layers can, which would undo the policy.
    body = _remat(body, execution.remat, prevent_cse=not execution.scan_layers)
    x_BTD = embed(params, tokens_BT, cfg)
    if dropout_key is not None:
        x_BTD = dropout(x_BTD, cfg.dropout, jax.random.fold_in(dropout_key, cfg.layers))
    if execution.scan_layers:
        x_BTD, _ = jax.lax.scan(body, x_BTD, (params["layers"], jnp.arange(cfg.layers)))
    else:
        layers = params["layers"]
        for i in range(cfg.layers):
            layer = layers[i] if isinstance(layers, tuple) else jax.tree.map(lambda leaf, i=i: leaf[i], layers)
            x_BTD, _ = body(x_BTD, (layer, jnp.int32(i)))
    return rms_norm(x_BTD, params["norm"]["scale"], cfg.norm_eps)


def head_kernel(params: Params, cfg: Model) -> Weight:
    """The output projection [D, V], float32 or frozen; with tied embeddings the transposed input table."""
    return params["embed"]["embedding"].T if cfg.tied_embeddings else params["head"]["kernel"]


def project(params: Params, x_BTD: jax.Array, cfg: Model) -> jax.Array:
    """Logits float32 [B, T, V] of hidden states."""
    products = [
        jnp.einsum("btd,dv->btv", x, whole(w, x.dtype), preferred_element_type=jnp.float32)
        for x, w, _ in terms(x_BTD, head_kernel(params, cfg))
    ]
    logits_BTV = functools.reduce(jnp.add, products)
    return jax.sharding.reshard(logits_BTV, P(*jax.typeof(x_BTD).sharding.spec[:2], None))


def logits(
    params: Params,
    tokens_BT: jax.Array,
    cfg: Model,
    execution: Execution,
    *,
    documents_BT: jax.Array | None = None,
) -> jax.Array:
    """Next-token logits, float32 [B, T, V].  Training uses `loss.cross_entropy`, which never holds them all."""
    return project(params, hidden(params, tokens_BT, cfg, execution, documents_BT=documents_BT), cfg)
