"""Names under which an attention implementation marks what its backward needs, for the remat policies."""

OUTPUT = "attn_out"  # the result, [B, T, H, K]
LSE = "attn_lse"  # log-sum-exp of each row of scores, float32, for implementations that never keep the scores
