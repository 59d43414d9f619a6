"""JAX's own splash attention for TPUs: the library path, until a kernel of ours is proven there.

Documents are masked, not skipped.
"""

from __future__ import annotations

import math

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from tinyllama_jax.attention.documents import Ranges
from tinyllama_jax.attention.names import OUTPUT

BLOCK = 512  # of queries and of keys; 2048 overflows the 16 MB of VMEM that a kernel gets on v4 and v5e


def splash(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, ranges: Ranges | None, interpret: bool = False
) -> jax.Array:
    """Causal attention, [B, T, H, K]; T a multiple of 128.  Its residuals bear the name OUTPUT."""
    rows, _, heads, _ = jax.typeof(q_BTHK).sharding.spec
    T, K = q_BTHK.shape[1], q_BTHK.shape[3]
    block = math.gcd(T, BLOCK)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def local(q_BTHK, k_BTGK, v_BTGK, documents_BT):
        run = kernel.make_splash_mha(
            masks.MultiHeadMask([masks.CausalMask((T, T))] * q_BTHK.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=OUTPUT,
            interpret=interpret,
        )
        q_BHTK, k_BGTK, v_BGTK = (x.transpose(0, 2, 1, 3) for x in (q_BTHK / math.sqrt(K), k_BTGK, v_BTGK))
        # The first key that a token sees names its document as well as an id.
        segments = documents_BT if documents_BT is None else kernel.SegmentIds(documents_BT, documents_BT)
        o_BHTK = jax.vmap(run)(q_BHTK, k_BGTK, v_BGTK, segments)
        return o_BHTK.transpose(0, 2, 1, 3).astype(q_BTHK.dtype)

    spec, by_row = P(rows, None, heads, None), P(rows, None)
    given = () if ranges is None else (reshard(ranges.first_BT, by_row),)
    run = jax.shard_map(
        lambda q, k, v, documents=None: local(q, k, v, documents),
        in_specs=(spec, spec, spec, *(by_row for _ in given)),
        out_specs=spec,
        check_vma=False,
    )
    return run(q_BTHK, *reshard((k_BTGK, v_BTGK), (spec, spec)), *given)
