"""TinyLlama in PyTorch: the model and the loss of torch_peer.py, in the form that is fastest there.

Queries, keys and values are one product, gate and up another.  x_BTD and q_BTHK are as in tinyllama_jax/model, weights
[out, in] as PyTorch has them.  Norms, RoPE, softmax and loss are float32 whatever the residual stream is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyllama_jax.config import Model


class RMSNorm(nn.Module):
    def __init__(self, cfg: Model):
        super().__init__()
        self.eps, self.weight = cfg.norm_eps, nn.Parameter(torch.ones(cfg.d_model))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE with the halves of a head as pairs, in float32; cos and sin [T, 1, K/2]."""
    first, second = x_BTHK.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTHK.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, repeat: bool) -> Tensor:
    """Causal attention over [B, heads, T, K]; `repeat` gives every query head keys and values of its own."""
    if repeat:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat)


class Block(nn.Module):
    def __init__(self, cfg: Model, repeat: bool):
        super().__init__()
        self.cfg, self.repeat = cfg, repeat
        self.attention_norm, self.mlp_norm = RMSNorm(cfg), RMSNorm(cfg)
        self.qkv = nn.Linear(cfg.d_model, (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim, bias=False)
        self.out = nn.Linear(cfg.heads * cfg.head_dim, cfg.d_model, bias=False)
        self.gate_up = nn.Linear(cfg.d_model, 2 * cfg.d_ff, bias=False)
        self.down = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        H, G = self.cfg.heads, self.cfg.kv_heads
        heads = self.qkv(self.attention_norm(x_BTD)).unflatten(-1, (H + 2 * G, self.cfg.head_dim))
        q, k, v = heads.split([H, G, G], dim=2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.repeat)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x_BTD)).split(self.cfg.d_ff, dim=-1)
        return x_BTD + self.down(F.silu(gate) * up)


class TinyLlama(nn.Module):
    def __init__(self, cfg: Model, dtype: torch.dtype, repeat: bool = False):
        super().__init__()
        self.dtype = dtype  # of the residual stream
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList([Block(cfg, repeat) for _ in range(cfg.layers)])
        self.norm, self.head = RMSNorm(cfg), nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        for name, parameter in self.named_parameters():  # as `tinyllama` in tinyllama_jax/model/init.py
            if parameter.dim() == 2:
                small = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=cfg.d_model**-0.5 / cfg.layers if small else (0.4 / cfg.d_model) ** 0.5)
        pairs = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim
        angles = torch.outer(torch.arange(cfg.context_tokens).float(), (cfg.rope.theta**-pairs).float())
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Final-normed hidden states [B, T, D]; the head is part of the loss."""
        T = tokens_BT.shape[1]
        x_BTD = self.embed(tokens_BT).to(self.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos[:T], self.sin[:T])
        return self.norm(x_BTD)


def load(model: TinyLlama, folder: Path) -> None:
    """The float32 weights of a Hugging Face Llama in one model.safetensors, as `export hf` writes it."""
    file = folder / "model.safetensors"
    raw = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(bytes(raw[:8].tolist()), "little")
    header = json.loads(bytes(raw[8:start].tolist()))

    def tensor(name: str) -> Tensor:
        about = header[name]
        begin, end = (start + place for place in about["data_offsets"])
        return raw[begin:end].clone().view(torch.float32).view(about["shape"])

    def put(target: nn.Module, *names: str) -> None:
        with torch.no_grad():
            target.weight.copy_(torch.cat([tensor(f"{name}.weight") for name in names]))

    for i, block in enumerate(model.blocks):
        layer = f"model.layers.{i}."
        put(block.attention_norm, f"{layer}input_layernorm")
        put(block.qkv, *(f"{layer}self_attn.{x}_proj" for x in "qkv"))
        put(block.out, f"{layer}self_attn.o_proj")
        put(block.mlp_norm, f"{layer}post_attention_layernorm")
        put(block.gate_up, f"{layer}mlp.gate_proj", f"{layer}mlp.up_proj")
        put(block.down, f"{layer}mlp.down_proj")
    for target, name in ((model.embed, "model.embed_tokens"), (model.norm, "model.norm"), (model.head, "lm_head")):
        put(target, name)


# --- the loss


def full_loss(x_BTD: Tensor, w_VD: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_BTD, w_VD).flatten(0, 1).float(), targets_BT.flatten())


def loss_and_slope(logits_CV: Tensor, targets_C: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """`share` times the summed loss of some tokens, and its gradient by their logits."""
    wide = logits_CV.float()
    log_p = wide - wide.logsumexp(dim=-1, keepdim=True)
    is_target = torch.arange(wide.shape[1], device=wide.device) == targets_C[:, None]
    loss = -share * log_p.gather(1, targets_C[:, None]).sum()
    return loss, (share * torch.where(is_target, log_p.exp() - 1, log_p.exp())).to(logits_CV.dtype)


class ChunkedLoss(torch.autograd.Function):
    """The mean loss with the logits of some tokens at a time; the gradients are made while the logits are there."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, w_VD: Tensor, targets_N: Tensor, chunks: int, body: Callable) -> Tensor:
        low_VD, dx_ND = w_VD.to(x_ND.dtype), torch.empty_like(x_ND)
        dw_VD, total = torch.zeros_like(w_VD, dtype=torch.float32), x_ND.new_zeros((), dtype=torch.float32)
        for x_CD, dx_CD, targets_C in zip(*(a.tensor_split(chunks) for a in (x_ND, dx_ND, targets_N)), strict=True):
            loss, slope_CV = body(x_CD @ low_VD.T, targets_C, 1 / len(x_ND))
            total += loss
            torch.mm(slope_CV, low_VD, out=dx_CD)
            if x_CD.dtype == torch.float32:
                dw_VD.addmm_(slope_CV.T, x_CD)
            else:
                dw_VD += slope_CV.T @ x_CD
        ctx.save_for_backward(dx_ND, dw_VD.to(w_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, slope: Tensor):
        dx_ND, dw_VD = ctx.saved_tensors
        return dx_ND * slope.to(dx_ND.dtype), dw_VD * slope.to(dw_VD.dtype), None, None, None


def make_loss(model: TinyLlama, args: argparse.Namespace) -> Callable[[Tensor, Tensor], Tensor]:
    """(tokens_BT, targets_BT) -> mean loss, compiled as the options say."""
    options = {"mode": args.compile, "dynamic": False}
    jit = (lambda f: f) if args.compile == "none" else lambda f: torch.compile(f, **options)
    whole = jit if args.compile_scope == "model" else lambda f: f
    if args.compile_scope == "block" and args.compile != "none":
        for module in (*model.blocks, model.norm):
            module.compile(**options)
    if args.loss == "chunked":
        hidden, body = whole(model), jit(loss_and_slope)
        return lambda tokens, targets: ChunkedLoss.apply(
            hidden(tokens).flatten(0, 1), model.head.weight, targets.flatten(), args.loss_chunks, body
        )
    tail = full_loss if args.compile_scope == "model" else jit(full_loss)
    return whole(lambda tokens, targets: tail(model(tokens), model.head.weight, targets))
