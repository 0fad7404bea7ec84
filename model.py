"""The Transfusion transformer (paper, section 3, "Model architecture"; the Llama block of footnote 4).

    tokens  --embedding-----------------------+                     +--head------------------> logits
                                              +--> Llama blocks ----+
    x_t, t  --patchify, + timestep, linear ---+    mask, RoPE       +--linear, unpatchify----> predicted noise

Text and patches have their own ways in and out; everything between is shared. Read `Transfusion.forward`
first, then `Block`, then the parts above it.

Exports `TransfusionConfig`, `SIZES` (the paper's five), `LinearPatches` and `Transfusion`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention


@dataclass
class TransfusionConfig:
    """The model's sizes; the defaults are the paper's smallest. ValueError if they do not fit together."""

    dim: int = 768  # width of the residual stream
    n_layers: int = 16
    n_heads: int = 12
    n_kv_heads: int = 0  # heads of keys and values, each for a group of query heads (Llama 3); 0 = n_heads
    mlp_multiple: int = 256  # the MLP is 8/3 dim wide, rounded up to a multiple of this
    mlp_width: int = 0  # or as wide as this (Llama 3); 0 = by mlp_multiple
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: tuple = ()  # Llama 3.1's factor, low and high frequency factor, original length
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMSNorm on queries and keys: not in the paper, steadier at high learning rates
    image_attention: Literal["bidirectional", "causal"] = "bidirectional"  # inside an image (section 4.3)
    patch_size: int = 2  # k: k x k latent pixels make one patch
    vocab_size: int = 32000
    latent_channels: int = 8
    latent_size: int = 32  # latent pixels a side

    def __post_init__(self):
        self.rope_scaling = tuple(self.rope_scaling)  # JSON has lists
        if self.dim % (2 * self.n_heads):
            wanted = f"a head needs an even width, so dim must be a multiple of {2 * self.n_heads}"
            raise ValueError(f"dim is {self.dim} and n_heads {self.n_heads}: {wanted}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads is {self.n_kv_heads}; it must divide n_heads, {self.n_heads}")
        if len(self.rope_scaling) not in (0, 4):
            wanted = "it must be four numbers, as in 8,1,4,8192"
            raise ValueError(f"rope_scaling is {self.rope_scaling}; {wanted}")
        if self.latent_size % self.patch_size:
            side = f"it must divide the latent image's side, {self.latent_size}"
            raise ValueError(f"patch_size is {self.patch_size}; {side}")

    @property
    def n_patches(self):
        """Transformer positions per image."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def head_dim(self):
        """Width of a head."""
        return self.dim // self.n_heads

    @property
    def kv_heads(self):
        """Heads of the keys and values."""
        return self.n_kv_heads or self.n_heads

    @property
    def mlp_dim(self):
        """Hidden width of the MLP."""
        return self.mlp_width or math.ceil(8 * self.dim / 3 / self.mlp_multiple) * self.mlp_multiple


SIZES = {  # section 4.1, table 2
    "0.16b": dict(n_layers=16, dim=768, n_heads=12),
    "0.37b": dict(n_layers=24, dim=1024, n_heads=16),
    "0.76b": dict(n_layers=24, dim=1536, n_heads=24),
    "1.4b": dict(n_layers=24, dim=2048, n_heads=16),
    "7b": dict(n_layers=32, dim=4096, n_heads=32),
}


# ---- The Llama block -----------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) over the last axis, in float32 whatever comes in."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def rope_table(positions, head_dim, theta, scaling=()):
    """cos and sin of the rotary embedding (Su et al. 2021): positions (B, S) -> two of (B, 1, S, head_dim).

    scaling: Llama 3.1's, see TransfusionConfig. Waves that turn fewer than `low` times within the original
    length become `factor` times as long; those that turn more than `high` times stay; between the two it
    is blended.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = theta**-exponents  # (head_dim / 2,)
    if scaling:
        factor, low, high, length = scaling
        kept = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)  # Llama's layout: i turns with i + head_dim / 2
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Turn each pair of components of x (B, H, S, head_dim) by its position's angle.

    q . k then depends on positions only by their difference.
    """
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    """Multi-head self-attention with RoPE.

    mask: who sees whom; a bool tensor, a BlockMask (FlexAttention), or None = everything sees everything.
    update(k, v): a KV cache's: it stores the new keys and values, and returns all.
    """

    def __init__(self, config):
        super().__init__()
        self.heads = config.n_heads, config.kv_heads, config.kv_heads  # of q, k and v
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, update=None):
        q, k, v = rearrange(self.qkv(x), "b s (h d) -> b h s d", d=self.head_dim).split(self.heads, dim=1)
        q = rotate(self.q_norm(q), rope)  # (B, H, S, head_dim); float32, as rope is
        k = rotate(self.k_norm(k), rope)
        # On a CPU the backward pass of bf16 attention is several times slower than that of float32.
        dtype = torch.float32 if x.device.type == "cpu" else v.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if update is not None:
            k, v = update(k, v)
        shared = self.heads[1] < self.heads[0]
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=shared)
        else:
            with torch.autocast("cpu", enabled=False):  # it would make bf16 of them again
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)
        return self.out(rearrange(y, "b h s d -> b s (h d)"))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): (silu(x W_gate) * x W_up) W_down."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.mlp_dim, bias=False)
        self.down = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, h, rope, mask, update=None):
        h = h + self.attention(self.attention_norm(h), rope, mask, update)
        return h + self.mlp(self.mlp_norm(h))


# ---- The ways in and out -------------------------------------------------------------------------


class TimestepEmbedding(nn.Module):
    """Sinusoids of t through an MLP, as in DiT (Peebles & Xie 2023): (N,) -> (N, out_dim)."""

    def __init__(self, dim, out_dim, n_sinusoids=256):
        super().__init__()
        half = n_sinusoids // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(n_sinusoids, dim), nn.SiLU(), nn.Linear(dim, out_dim))

    def forward(self, t):
        angles = t[:, None].float() * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def patchify(x, patch_size):
    """Latent images to patch vectors in row-major order: (N, C, H, W) -> (N, H/k W/k, k k C)."""
    return rearrange(x, "n c (h p) (w q) -> n (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches, patch_size, latent_size):
    """The inverse of patchify."""
    h = latent_size // patch_size
    return rearrange(patches, "n (h w) (p q c) -> n c (h p) (w q)", p=patch_size, q=patch_size, h=h)


class LinearPatches(nn.Module):
    """The paper's alternative (a): one linear layer into the transformer, and one out.

    The timestep's embedding is added to every patch vector before the first (footnote 6).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        patch_dim = config.patch_size**2 * config.latent_channels
        self.timestep = TimestepEmbedding(config.dim, patch_dim)
        self.encoder = nn.Linear(patch_dim, config.dim)
        self.decoder = nn.Linear(config.dim, patch_dim)

    def encode(self, x_t, t):
        """(N, C, H, W), (N,) -> (N, P, dim), and None; the U-Net hands its skips to `decode`."""
        patches = patchify(x_t, self.config.patch_size) + self.timestep(t)[:, None]  # (N, P, k k C)
        return self.encoder(patches), None

    def decode(self, h, kept):
        """(N, P, dim) -> (N, C, H, W)."""
        return unpatchify(self.decoder(h), self.config.patch_size, self.config.latent_size)


class Transfusion(nn.Module):
    """One transformer over tokens and patches; see the drawing at the top of the file.

    patches(config) makes the patch encoder and decoder; block(config) makes one layer.
    """

    def __init__(self, config, patches=LinearPatches, block=Block):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.patches = patches(config)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)  # untied from the embedding
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # 2 n_layers outputs are added to the residual stream: its variance shall not grow with depth (GPT-2).
        for layer in self.blocks:
            for linear in (layer.attention.out, layer.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.n_layers))

    def embed(self, tokens, image_id, x_t, t):
        """Tokens and noised images -> the blocks' input (B, S, dim), the patches' slots, `kept` for `decode`.

        Slots: (N P,) indices into the flattened B S positions, in reading order.
        """
        h = self.embedding(tokens).float()  # (B, S, dim): the residual stream is float32, always
        # A stable sort puts the patches first, in reading order. (Boolean indexing has no shape known ahead.)
        text_last = torch.argsort(image_id.flatten() < 0, stable=True)  # (B S,)
        slots = text_last[: len(x_t) * self.config.n_patches]  # (N P,)
        patches, kept = self.patches.encode(x_t, t)  # (N, P, dim)
        h = h.flatten(0, 1).index_copy(0, slots, patches.to(h.dtype).flatten(0, 1)).view_as(h)  # (B, S, dim)
        return h, slots, kept

    def trunk(self, h, positions, mask=None, update=None):
        """The shared blocks and the final norm: h (B, S, dim), positions (B, S) -> (B, S, dim).

        mask: bool, True = may attend, broadcastable to (B, 1, S, keys), or a BlockMask; None = everything.
        update(layer, k, v): a KV cache's; it returns all visible keys and values of that layer.
        """
        config = self.config
        rope = rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        for layer, block in enumerate(self.blocks):
            h = block(h, rope, mask, None if update is None else partial(update, layer))
        return self.norm(h)

    def forward(self, tokens, image_id, positions, mask, x_t, t):
        """A mixed batch -> logits (B, S, vocab_size), and a prediction for each image (N, C, H, W).

        tokens, image_id, positions: (B, S), as in data.Batch
        mask: transfusion_mask (B, 1, S, S) or flex_mask, of attention_mask.py
        x_t: (N, C, H, W), the noised latents of the batch's images in reading order
        t: (N,), their timesteps, 0 = clean
        """
        h, slots, kept = self.embed(tokens, image_id, x_t, t)  # (B, S, dim)
        h = self.trunk(h, positions, mask)  # (B, S, dim)
        patches = h.flatten(0, 1)[slots].unflatten(0, (-1, self.config.n_patches))  # (N, P, dim)
        return self.head(h), self.patches.decode(patches, kept)


if __name__ == "__main__":
    print("  size  layers   dim  heads    MLP |  blocks  embedding + head  sum (B) | patches in and out")
    for name, size in SIZES.items():
        with torch.device("meta"):  # shapes without storage
            model = Transfusion(TransfusionConfig(**size))
        c = model.config
        parts = (model.blocks, nn.ModuleList([model.embedding, model.head]), model.patches)
        blocks, ends, patches = (sum(p.numel() for p in part.parameters()) / 1e9 for part in parts)
        row = f"{name:>6}  {c.n_layers:6}  {c.dim:4}  {c.n_heads:5}  {c.mlp_dim:5} |"
        print(f"{row} {blocks:7.3f}  {ends:16.3f}  {blocks + ends:7.3f} | {patches:.4f}")
    print("Billions of parameters. `python extras/costs.py` prints what training them costs.")
