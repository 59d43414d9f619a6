"""Causal grouped-query attention: one public function, several implementations with the same numbers.

    reference   the formula in plain JAX, every score in memory          any device
    blocks      the same by blocks of queries, without the future        any device; what CPUs take
    xla         jax.nn.dot_product_attention                             any device
    cudnn       the same through cuDNN; no documents                     NVIDIA GPUs
    splash      jax's splash attention                                   TPUs
    triton      ours, Pallas-Triton                                      NVIDIA GPUs from the A100 on
    hopper      ours, Pallas Mosaic GPU                                  H100, H200
    tpu         ours, Pallas Mosaic TPU                                  TPUs v4 and later

The last three, blocks and the reference also serve rows whose tokens the mesh's `context` splits: stripes.py.
Ours skip what no query of a block can see, in the forward and in both backward passes.  choice.py picks for `auto`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from tinyllama_jax import sharding
from tinyllama_jax.attention import choice, documents
from tinyllama_jax.attention.choice import Call, choose
from tinyllama_jax.attention.cudnn import cudnn
from tinyllama_jax.attention.documents import Ranges, ranges
from tinyllama_jax.attention.fused import Options, by_kernel
from tinyllama_jax.attention.names import CUDNN_FORWARD, LSE, OUTPUT
from tinyllama_jax.attention.reference import reference
from tinyllama_jax.attention.xla import xla
from tinyllama_jax.errors import ConfigError

__all__ = ["CUDNN_FORWARD", "LSE", "OUTPUT", "Call", "Ranges", "attention", "choose", "ranges"]


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    documents: jax.Array | Ranges | None = None,
    q_positions_BT: jax.Array | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(K)) v, causal, [B, T, H, K] in q's dtype; query head h reads key/value head h // (H/G).

    documents       int ids [B, T] of a packed row: a query sees only keys of its own document, which is a run of
                    equal ids.  Or their `ranges`, made once for all layers.  Needs S = T.
    q_positions_BT  for a key/value cache: query t of row b sees cache slots 0 .. q_positions_BT[b, t].
                    Without it S = T and query t sees keys 0 .. t.
    window          a query sees at most this many keys, itself included.
    soft_cap        scores s become soft_cap tanh(s / soft_cap) before the softmax.
    return_lse      also return the log-sum-exp of each row of scores, float32 [B, H, T], natural logarithm: what
                    results over parts of the keys are merged by.

    Runs under `jax.set_mesh`, sharded as q in rows, tokens and heads; tokens that are sharded are `sharding.striped`,
    but `ranges` are of the row in its order.  Raises ConfigError for shapes that do not fit together, for an unknown
    implementation, and for one that cannot serve the call; nothing is ignored.
    """
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    if k_BSGK.shape != v_BSGK.shape or k_BSGK.shape != (B, S, G, K):
        raise ConfigError(f"attention: q {q_BTHK.shape}, k {k_BSGK.shape} and v {v_BSGK.shape} do not fit together")
    if not q_BTHK.dtype == k_BSGK.dtype == v_BSGK.dtype:
        raise ConfigError(f"attention: q is {q_BTHK.dtype}, k {k_BSGK.dtype} and v {v_BSGK.dtype}")
    if H % G:
        raise ConfigError(f"attention: {G} key/value heads do not divide {H} query heads")
    if q_positions_BT is None and S != T:
        raise ConfigError(f"attention: {T} queries against {S} keys need q_positions_BT")
    if q_positions_BT is not None and (documents is not None or window is not None):
        raise ConfigError("attention: q_positions_BT goes with neither documents nor window; decode one document a row")
    if window is not None and window < 1:
        raise ConfigError(f"attention: window={window}, but a query sees at least itself")

    rows, context = sharding.batch_axes(q_BTHK), sharding.parts(sharding.token_axis(q_BTHK))
    if context > 1 and q_positions_BT is not None:
        raise ConfigError("attention: q_positions_BT goes with whole rows, and mesh.context splits these")
    if B == 1 and rows is not None:
        # The axes are of size 1 then.  JAX 0.12 forgets them where heads are split by 1, and complains that q and k lie
        # differently; so they are put aside for the while.
        q_BTHK, k_BSGK, v_BSGK, documents, q_positions_BT = (
            jax.tree.map(lambda x: reshard(x, P(None, *jax.typeof(x).sharding.spec[1:])), tree)
            for tree in (q_BTHK, k_BSGK, v_BSGK, documents, q_positions_BT)
        )
    seen = _ranges(documents, q_BTHK, window)
    call = Call(
        head_dim=K,
        dtype=q_BTHK.dtype,
        queries=T,
        ranges=seen is not None,
        window=window is not None,
        cache=q_positions_BT is not None,
        soft_cap=soft_cap,
        lse=return_lse,
        context=context,
    )
    name, _ = choose(implementation, call)
    o_BTHK, lse_BHT = _run(name, q_BTHK, k_BSGK, v_BSGK, seen, q_positions_BT, soft_cap, return_lse)
    if B == 1 and rows is not None:
        o_BTHK = reshard(o_BTHK, P(rows, *jax.typeof(o_BTHK).sharding.spec[1:]))
        lse_BHT = lse_BHT if lse_BHT is None else reshard(lse_BHT, P(rows, *jax.typeof(lse_BHT).sharding.spec[1:]))
    return (o_BTHK, lse_BHT) if return_lse else o_BTHK


def _run(name, q_BTHK, k_BSGK, v_BSGK, seen, q_positions_BT, soft_cap, return_lse):
    """Implementation `name`: the result, and the log-sum-exp or None."""
    if name == "reference" and sharding.parts(sharding.token_axis(q_BTHK)) == 1:
        answer = reference(q_BTHK, k_BSGK, v_BSGK, seen, q_positions_BT, soft_cap, return_lse)
        return answer if return_lse else (answer, None)
    if name == "xla":
        return xla(q_BTHK, k_BSGK, v_BSGK, seen, q_positions_BT), None
    if name == "cudnn":
        return cudnn(q_BTHK, k_BSGK, v_BSGK), None
    if name == "splash":
        from tinyllama_jax.attention.splash import splash  # Pallas for TPUs, which only TPUs need

        return splash(q_BTHK, k_BSGK, v_BSGK, seen), None
    interpret = name.startswith(choice.INTERPRET)
    options = Options(name.removeprefix(choice.INTERPRET), sharding.device()[1], soft_cap, interpret)
    return by_kernel(q_BTHK, k_BSGK, v_BSGK, seen, options)


def _ranges(given: jax.Array | Ranges | None, q_BTHK: jax.Array, window: int | None) -> Ranges | None:
    if isinstance(given, Ranges):
        return given if window is None else documents.narrow(given, window)
    if given is not None:
        return ranges(given, window)
    if window is None:
        return None
    one_document_BT = jnp.zeros(q_BTHK.shape[:2], jnp.int32, out_sharding=P(sharding.batch_axes(q_BTHK), None))
    return ranges(one_document_BT, window)
