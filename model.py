"""The Transfusion transformer (paper, section 3, "Model architecture"; the Llama block of footnote 4).

    tokens  --embedding-----------------------------+                     +--head------------> logits
                                                    +--> Llama blocks ----+
    x_t, t  --patchify, + timestep, linear ---------+    mask, RoPE       +--linear, unpatchify-> predicted noise

Text and patches have their own ways in and out; everything between is shared. Read `Transfusion.forward` first, then up
from `Block`. Sampling uses the same pieces one modality at a time, with a `KVCache`.
Exports `TransfusionConfig`, `SIZES` (the paper's table of models), `Transfusion` and `KVCache`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass
class TransfusionConfig:
    """The model's sizes; the defaults are the paper's smallest. Raises ValueError if they do not fit together."""

    dim: int = 768
    n_layers: int = 16
    n_heads: int = 12
    mlp_multiple: int = 256  # the MLP is 8/3 dim wide, rounded up to a multiple of this
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMSNorm on queries and keys: not in the paper's model, steadier at high learning rates
    patch_size: int = 2  # k: k x k latent pixels make one patch
    vocab_size: int = 32000
    latent_channels: int = 8
    latent_size: int = 32  # latent pixels a side

    def __post_init__(self):
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"dim is {self.dim} and n_heads {self.n_heads}: a head needs an even width, so dim must be a multiple of {2 * self.n_heads}")
        if self.latent_size % self.patch_size:
            raise ValueError(f"patch_size is {self.patch_size}; it must divide the latent image's side, {self.latent_size}")

    @property
    def n_patches(self):
        """Transformer positions per image."""
        return (self.latent_size // self.patch_size) ** 2

    @property
    def mlp_dim(self):
        """Hidden width of the MLP."""
        return math.ceil(8 * self.dim / 3 / self.mlp_multiple) * self.mlp_multiple


SIZES = {  # section 4.1, table 2
    "0.16b": dict(n_layers=16, dim=768, n_heads=12),
    "0.37b": dict(n_layers=24, dim=1024, n_heads=16),
    "0.76b": dict(n_layers=24, dim=1536, n_heads=24),
    "1.4b": dict(n_layers=24, dim=2048, n_heads=16),
    "7b": dict(n_layers=32, dim=4096, n_heads=32),
}


# ---- The Llama block ------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) over the last axis, in float32 whatever comes in."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def rope_table(positions, head_dim, theta):
    """cos and sin of the rotary embedding (Su et al. 2021): positions (B, S) -> two of (B, 1, S, head_dim), float32."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)  # Llama's layout: component i is rotated with component i + head_dim / 2
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Turn each pair of components of x (B, H, S, head_dim) by its position's angle; q . k then depends on distance alone."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    """Multi-head self-attention with RoPE. The mask says who sees whom; None = everything sees everything."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        head_dim = config.dim // config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, cache=None, layer=0):
        q, k, v = rearrange(self.qkv(x), "b s (three h d) -> three b h s d", three=3, h=self.n_heads)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)  # rope is float32, and so are these
        # On CPU the backward of bf16 attention is several times slower than float32's: stay in float32 there.
        q, k, v = (z.float() if x.device.type == "cpu" else z.to(v.dtype) for z in (q, k, v))
        if cache is not None:
            k, v = cache.update(layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
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
    """Pre-norm attention, then pre-norm MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, h, rope, mask, cache=None, layer=0):
        h = h + self.attention(self.attention_norm(h), rope, mask, cache, layer)
        return h + self.mlp(self.mlp_norm(h))


class KVCache:
    """Keys and values of the positions decoded so far; position p of a document lives in slot p, whatever it holds.

    Set with `at` which rows the next call concerns, where its tokens stand and how many slots they may look back on.
    Writing a slot again replaces it: that is how an image being denoised moves from x_t to x_{t-1} in its place.
    """

    def __init__(self, config, rows, length, device="cpu", dtype=torch.float32):
        shape = config.n_layers, rows, config.n_heads, length, config.dim // config.n_heads
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def at(self, rows, positions, visible):
        """rows: R ints; positions (R, n) being written now; visible: attention spans slots 0..visible-1."""
        rows = [int(row) for row in rows]
        self.row_index, self.positions, self.visible = torch.tensor(rows, device=self.k.device)[:, None], positions, visible
        evenly = slice(rows[0], rows[-1] + 1, rows[1] - rows[0] if len(rows) > 1 else 1)
        # Evenly spaced rows are looked at where they lie; others are copied together, in every layer of every call.
        self.rows = evenly if list(range(evenly.start, evenly.stop, evenly.step)) == rows else self.row_index[:, 0]
        return self

    def update(self, layer, k, v):
        """Write this call's keys and values (R, H, n, d), return all visible ones (R, H, visible, d)."""
        self.k[layer, self.row_index, :, self.positions] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer, self.row_index, :, self.positions] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer, self.rows, :, : self.visible].to(k.dtype), self.v[layer, self.rows, :, : self.visible].to(v.dtype)


# ---- The ways in and out --------------------------------------------------------------------------------------------


class TimestepEmbedding(nn.Module):
    """Sinusoids of t through an MLP, as in DiT (Peebles & Xie 2023): (N,) -> (N, out_dim)."""

    def __init__(self, dim, out_dim, n_sinusoids=256):
        super().__init__()
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * torch.arange(n_sinusoids // 2) / (n_sinusoids // 2)), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(n_sinusoids, dim), nn.SiLU(), nn.Linear(dim, out_dim))

    def forward(self, t):
        angles = t[:, None].float() * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def patchify(x, patch_size):
    """Latent images to patch vectors in row-major order: (N, C, H, W) -> (N, H/k W/k, k k C)."""
    return rearrange(x, "n c (h p) (w q) -> n (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches, patch_size, latent_size):
    """The inverse of patchify."""
    return rearrange(patches, "n (h w) (p q c) -> n c (h p) (w q)", p=patch_size, q=patch_size, h=latent_size // patch_size)


class LinearPatches(nn.Module):
    """The paper's alternative (a): one linear layer into the transformer, with the timestep added to every patch vector
    before it (footnote 6), and one linear layer out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        patch_dim = config.patch_size**2 * config.latent_channels
        self.timestep = TimestepEmbedding(config.dim, patch_dim)
        self.encoder = nn.Linear(patch_dim, config.dim)
        self.decoder = nn.Linear(config.dim, patch_dim)

    def encode(self, x_t, t):
        """(N, C, H, W), (N,) -> (N, P, dim)."""
        return self.encoder(patchify(x_t, self.config.patch_size) + self.timestep(t)[:, None])

    def decode(self, h):
        """(N, P, dim) -> (N, C, H, W)."""
        return unpatchify(self.decoder(h), self.config.patch_size, self.config.latent_size)


class Transfusion(nn.Module):
    """One transformer over tokens and patches; see the drawing at the top of the file."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.patches = LinearPatches(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)  # untied from the embedding
        self.apply(self._init)
        for block in self.blocks:  # as many additions to the residual stream as 2 n_layers: keep its variance (GPT-2)
            for linear in (block.attention.out, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.n_layers))

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(self, tokens, image_id, x_t, t):
        """Tokens and noised images -> the input of the trunk (B, S, dim), and where its patches are: (N P,) indices into
        the flattened B S positions, in reading order."""
        h = self.embedding(tokens)
        is_patch = image_id >= 0
        # A stable sort brings the patches to the front in reading order; unlike boolean indexing, its shape is known ahead.
        slots = torch.argsort(~is_patch.flatten(), stable=True)[: x_t.shape[0] * self.config.n_patches]
        patches = self.patches.encode(x_t, t).to(h.dtype)
        return h.flatten(0, 1).index_copy(0, slots, patches.flatten(0, 1)).view_as(h), slots

    def trunk(self, h, positions, mask=None, cache=None):
        """The shared blocks and the final norm: h (B, S, dim), positions (B, S) -> (B, S, dim). mask: bool, True = may
        attend, broadcastable to (B, 1, S, keys). With a cache, the keys are its visible slots."""
        rope = rope_table(positions, self.config.dim // self.config.n_heads, self.config.rope_theta)
        for layer, block in enumerate(self.blocks):
            h = block(h, rope, mask, cache, layer)
        return self.norm(h)

    def forward(self, tokens, image_id, positions, mask, x_t, t):
        """A mixed batch, as in training.

        tokens, image_id, positions: (B, S), as in data.Batch; mask: (B, 1, S, S), from attention_mask.transfusion_mask
        x_t: (N, C, H, W), the noised latents of the batch's images in reading order; t: (N,), their timesteps, 0 = clean
        Returns logits (B, S, vocab_size) and the prediction for each image (N, C, H, W).
        """
        h, slots = self.embed(tokens, image_id, x_t, t)
        h = self.trunk(h, positions, mask)
        patches = h.flatten(0, 1)[slots].unflatten(0, (-1, self.config.n_patches))
        return self.head(h), self.patches.decode(patches)


if __name__ == "__main__":
    print("  size   layers   dim  heads   MLP |  blocks  embedding + head  patches  total (B)")
    for name, size in SIZES.items():
        with torch.device("meta"):  # shapes without storage
            model = Transfusion(TransfusionConfig(**size))
        count = {part: sum(p.numel() for p in getattr(model, part).parameters()) / 1e9 for part in ("blocks", "embedding", "head", "patches")}
        c = model.config
        print(f"{name:>6}  {c.n_layers:6}  {c.dim:5}  {c.n_heads:5}  {c.mlp_dim:4} | {count['blocks']:7.3f}  {count['embedding'] + count['head']:16.3f}  {count['patches']:7.4f}  {sum(count.values()):8.3f}")
