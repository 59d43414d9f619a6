"""Causal grouped-query attention: one public function, several implementations with the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from tinyllama_jax import sharding
from tinyllama_jax.attention.names import LSE, OUTPUT
from tinyllama_jax.attention.reference import reference
from tinyllama_jax.attention.xla import xla
from tinyllama_jax.config import ConfigError

__all__ = ["IMPLEMENTATIONS", "LSE", "OUTPUT", "attention", "choose"]

# name -> f(q_BTHK, k_BSGK, v_BSGK, documents_BT or None, q_positions_BT or None) -> [B, T, H, K].  The one place
# where an implementation is added; it marks its residuals with the names OUTPUT and LSE (attention/names.py).
IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"reference": reference, "xla": xla}


def choose(implementation: str = "auto", platform: str | None = None) -> tuple[str, str]:
    """The implementation that will run on `platform` (default: the one JAX uses) and why, for the log.

    Raises ConfigError for an unknown name.
    """
    platform = platform or jax.default_backend()
    if implementation == "auto":
        return "reference", f"no fused kernel for {platform}; masked softmax over all scores"
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"execution.attention={implementation!r} is unknown; choose one of auto, {', '.join(IMPLEMENTATIONS)}"
        )
    return implementation, "named in execution.attention"


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    documents_BT: jax.Array | None = None,
    q_positions_BT: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v, causal, [B, T, H, K] in q's dtype; query head h reads key/value head h // (H/G).

    documents_BT    int segment ids of a packed row: a query sees only keys of its own document.  Needs S = T.
    q_positions_BT  for a key/value cache: query t of row b sees cache slots 0 .. q_positions_BT[b, t].
                    Without it S = T and query t sees keys 0 .. t.

    Raises ConfigError for shapes or combinations that no implementation supports.
    """
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    if k_BSGK.shape != v_BSGK.shape or k_BSGK.shape != (B, S, G, K):
        raise ConfigError(f"attention: q {q_BTHK.shape}, k {k_BSGK.shape} and v {v_BSGK.shape} do not fit together")
    if H % G:
        raise ConfigError(f"attention: {G} key/value heads do not divide {H} query heads")
    if q_positions_BT is None and S != T:
        raise ConfigError(f"attention: {T} queries against {S} keys need q_positions_BT")
    if q_positions_BT is not None and documents_BT is not None:
        raise ConfigError("attention: documents_BT and q_positions_BT cannot be combined; decode one document per row")
    name, _ = choose(implementation)
    arrays, rows = (q_BTHK, k_BSGK, v_BSGK, documents_BT, q_positions_BT), sharding.batch_axes(q_BTHK)
    if B == 1 and rows is not None:
        # The axes are of size 1 then.  JAX 0.12 forgets them where heads are split by 1, and complains that q and k lie
        # differently; so they are put aside for the while.
        out_BTHK = IMPLEMENTATIONS[name](*(x if x is None else sharding.gather(x) for x in arrays))
        return reshard(out_BTHK, P(rows, None, None, None))
    return IMPLEMENTATIONS[name](*arrays)
