"""Direct preference optimisation: the loss of pairs of answers, and what is watched while it falls.

A pair is one row with two documents, 0: prompt and preferred answer, 1: prompt and other answer; `valid` marks the
targets of the answers.  RoPE and document masking make each document's result that of a row of its own.

With log-probabilities of whole answers, the log-ratio of an answer is policy - reference, its reward beta * log-ratio,
and the margin of a pair the reward of the preferred answer - the reward of the other (arXiv 2305.18290, section 4):

    sigmoid   -(1 - s) log sigmoid(margin) - s log sigmoid(-margin), with s = label_smoothing: the chance that a pair is
              labelled the wrong way round (conservative DPO, ericmitchell.ai/cdpo.pdf, equation 3); DPO with s = 0
    ipo       (m - 1 / (2 beta))^2, with m the difference of log-ratios *per token* (arXiv 2310.12036, equation 17).
              The paper writes sums.  TRL divides each by its answer's number of tokens, as the paper's authors advised
              (huggingface/trl#1265, huggingface/blog#1785), so that beta does not depend on the length of answers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from tinyllama_jax.config import Execution, Model, Preference
from tinyllama_jax.loss import token_nll
from tinyllama_jax.model import transformer

METRICS = ("margin", "accuracy", "chosen_reward", "rejected_reward", "kl", "chosen_nll")


def answer_logps(
    params: Any,
    batch: dict[str, jax.Array],
    model: Model,
    execution: Execution,
    *,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Log-probabilities of both answers, in nats: sums over the valid targets of documents 0 and 1, float32 [B, 2].

    batch: tokens, targets, valid, documents [B, T], on any mesh; rows lie as before in the result.
    """
    x_BTD = transformer.hidden(
        params, batch["tokens"], model, execution, documents_BT=batch["documents"], dropout_key=dropout_key
    )
    nll_BT = token_nll(
        x_BTD,
        transformer.head_kernel(params, model),
        batch["targets"],
        chunk_tokens=execution.loss_chunk_tokens,
    )
    spec = jax.typeof(nll_BT).sharding.spec
    answers = _answers(reshard(batch["valid"], spec), reshard(batch["documents"], spec))
    # A select, not a product: what the model makes of padding may be anything.
    return jnp.stack([-jnp.sum(jnp.where(mask_BT, nll_BT, 0.0), axis=1) for mask_BT in answers], axis=1)


def answer_tokens(batch: dict[str, jax.Array]) -> jax.Array:
    """Number of tokens of both answers, float32 [B, 2]."""
    answers = _answers(batch["valid"], batch["documents"])
    return jnp.stack([jnp.sum(mask_BT, axis=1, dtype=jnp.int32) for mask_BT in answers], axis=1).astype(jnp.float32)


def _answers(valid_BT: jax.Array, documents_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A valid target lies in the document of its input token."""
    return valid_BT & (documents_BT == 0), valid_BT & (documents_BT == 1)


def losses(
    policy_B2: jax.Array, reference_B2: jax.Array, tokens_B2: jax.Array, preference: Preference
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Of each pair: the loss [B], and METRICS, each [B], without gradients.

    policy, reference: log-probabilities of both answers, tokens: how many they have.
    margin          beta * (log-ratio of the preferred answer - that of the other), for every kind of loss
    accuracy        1 where the margin is positive, 1/2 where it is exactly 0, as before the first step
    chosen_reward, rejected_reward: beta * log-ratio
    kl              how far the policy has gone from the reference, in nats per token, never negative: the estimator
                    exp(-d) - 1 + d ("k3", joschu.net/blog/kl-approx.html) of the mean log-ratio per token d, averaged
                    over both answers.  It is convex: the mean of k3 over single tokens is no less.  The answers are
                    the data's and not drawn from the policy, so it is a measure of drift and no unbiased estimate.
    chosen_nll      nats per token of the preferred answer
    """
    log_ratio_B2 = policy_B2 - jax.lax.stop_gradient(reference_B2)
    tokens_B2 = jnp.maximum(tokens_B2, 1.0)
    per_token_B2 = log_ratio_B2 / tokens_B2
    margin_B = preference.beta * (log_ratio_B2[:, 0] - log_ratio_B2[:, 1])
    if preference.loss == "ipo":
        loss_B = jnp.square(per_token_B2[:, 0] - per_token_B2[:, 1] - 1 / (2 * preference.beta))
    else:
        loss_B = -jax.nn.log_sigmoid(margin_B)
        if preference.label_smoothing:
            wrong_B = -jax.nn.log_sigmoid(-margin_B)
            loss_B = (1 - preference.label_smoothing) * loss_B + preference.label_smoothing * wrong_B
    metrics = {
        "margin": margin_B,
        "accuracy": (1 + jnp.sign(margin_B)) / 2,
        "chosen_reward": preference.beta * log_ratio_B2[:, 0],
        "rejected_reward": preference.beta * log_ratio_B2[:, 1],
        "kl": jnp.mean(jnp.expm1(-per_token_B2) + per_token_B2, axis=1),
        "chosen_nll": -policy_B2[:, 0] / tokens_B2[:, 0],
    }
    return loss_B, jax.lax.stop_gradient(metrics)


def micro_loss(
    params: Any,
    micro: dict[str, jax.Array],
    model: Model,
    execution: Execution,
    preference: Preference,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums over a micro-batch's pairs, float32 scalars: of the loss, to be differentiated by `params`, and of METRICS.

    micro: tokens, targets, valid, documents [B, T] and reference [B, 2], float32: the answers' log-probabilities with
    the weights at the start.
    """
    policy_B2 = answer_logps(params, micro, model, execution, dropout_key=dropout_key)
    spec = jax.typeof(policy_B2).sharding.spec
    reference_B2, tokens_B2 = reshard(micro["reference"], spec), reshard(answer_tokens(micro), spec)
    loss_B, metrics = losses(policy_B2, reference_B2, tokens_B2, preference)
    return jnp.sum(loss_B), jax.tree.map(jnp.sum, metrics)
