"""Names by which a remat policy knows what an implementation's backward pass reads."""

OUTPUT = "attn_out"  # the result, [B, T, H, K]
LSE = "attn_lse"  # log-sum-exp of each row of scores, float32, for implementations that never keep the scores
CUDNN_FORWARD = "dot_product_attention_fwd"  # JAX's primitive: its results are the same two, and bear no names
