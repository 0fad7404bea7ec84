"""The Transfusion transformer (paper, section 3, "Model architecture"; the Llama block of footnote 4).

    tokens  --embedding-----------------------------+                     +--head------------> logits
                                                    +--> Llama blocks ----+
    x_t, t  --patchify, + timestep, linear ---------+    mask, RoPE       +--linear, unpatchify-> predicted noise
            --or: U-Net down blocks-----------------+         skips       +--U-Net up blocks----> predicted noise

Text and patches have their own ways in and out; everything between is shared. Read `Transfusion.forward` first, then
`Block`, then the parts above it. Sampling uses the same pieces one modality at a time, with a `KVCache`. With `images="discrete"` it is the paper's
baseline, Chameleon (2024): images are tokens, too, codes of a VQ-VAE after the text's in the vocabulary, and there are no patches.
Exports `TransfusionConfig`, `SIZES` (the paper's table of models), `Transfusion` and `KVCache`; `training_flops` and others of
what a size costs; and last, for a reader of the paper to skip, `load_llama` and `freeze_text`, to start from a Llama.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from vae import Downsample, ResBlock, norm, read_json, read_safetensors


@dataclass
class TransfusionConfig:
    """The model's sizes; the defaults are the paper's smallest. Raises ValueError if they do not fit together."""

    dim: int = 768
    n_layers: int = 16
    n_heads: int = 12
    n_kv_heads: int = 0  # heads of the keys and values, each shared by a group of query heads (Llama 3); 0 = n_heads
    mlp_multiple: int = 256  # the MLP is 8/3 dim wide, rounded up to a multiple of this
    mlp_width: int = 0  # or as wide as this (Llama 3); 0 = by mlp_multiple
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # Llama 3.1's: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMSNorm on queries and keys: not in the paper's model, steadier at high learning rates
    patch_size: int = 2  # k: k x k latent pixels make one patch
    patch_encoder: str = "linear"  # the paper's alternatives: linear, or unet
    unet_channels: int = 1024  # width of the U-Net where a pixel is a patch; each doubling of the resolution halves it
    unet_blocks: int = 4  # residual blocks of the U-Net at each resolution, on the way in and again on the way out
    vocab_size: int = 32000
    latent_channels: int = 8
    latent_size: int = 32  # latent pixels a side
    images: str = "continuous"  # continuous, or discrete: codes among the tokens, as in Chameleon, one for each latent pixel
    image_attention: str = "bidirectional"  # bidirectional or causal, inside an image (section 4.3); codes are always read causally
    post_norm: bool = False  # norms after attention and MLP instead of before them (Swin v2's placement, Chameleon's)

    def __post_init__(self):
        choices = {"images": ("continuous", "discrete"), "image_attention": ("bidirectional", "causal"), "patch_encoder": ("linear", "unet")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.images == "discrete":
            self.image_attention, self.patch_size = "causal", 1
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"dim is {self.dim} and n_heads {self.n_heads}: a head needs an even width, so dim must be a multiple of {2 * self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads is {self.n_kv_heads}; it must divide n_heads, {self.n_heads}")
        self.rope_scaling = tuple(self.rope_scaling)  # JSON has lists
        if len(self.rope_scaling) not in (0, 4):
            raise ValueError(f"rope_scaling is {self.rope_scaling}; it must be four numbers, as in 8,1,4,8192")
        if self.latent_size % self.patch_size:
            raise ValueError(f"patch_size is {self.patch_size}; it must divide the latent image's side, {self.latent_size}")
        if self.patch_encoder == "unet":
            if self.patch_size & (self.patch_size - 1):
                raise ValueError(f"patch_size is {self.patch_size}; a U-Net halves the resolution, so it must be 1, 2, 4, 8 or another power of two")
            if self.unet_blocks < 1:
                raise ValueError(f"unet_blocks is {self.unet_blocks}; it must be at least 1")
            widths = [self.unet_channels / 2**level for level in range(self.patch_size.bit_length())]
            if any(width < 1 or width % 4 or width > 64 and width % 32 for width in widths):  # the groups of the norms must divide them
                k = self.patch_size
                raise ValueError(f"unet_channels is {self.unet_channels}; with patch_size {k} it must be a multiple of {4 * k}, such as {16 * k}")

    @property
    def n_patches(self):
        """Transformer positions per image."""
        return (self.latent_size // self.patch_size) ** 2

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


# ---- The Llama block ------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) over the last axis, in float32 whatever comes in."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def rope_table(positions, head_dim, theta, scaling=()):
    """cos and sin of the rotary embedding (Su et al. 2021): positions (B, S) -> two of (B, 1, S, head_dim), float32.

    scaling: of Llama 3.1, `TransfusionConfig.rope_scaling`. Waves that turn fewer than `low` times within the original
    length become `factor` times as long, those that turn more than `high` times stay, and between the two it is blended.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    if scaling:
        factor, low, high, length = scaling
        kept = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)  # Llama's layout: component i is rotated with component i + head_dim / 2
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Turn each pair of components of x (B, H, S, head_dim) by its position's angle; q . k then depends on distance alone."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    """Multi-head self-attention with RoPE. The mask says who sees whom: a bool tensor, a BlockMask (FlexAttention), or None =
    everything sees everything. update: of a KVCache; it takes the new keys and values and returns all that are visible."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.n_heads, config.kv_heads, config.kv_heads  # of q, k and v
        self.head_dim = head_dim = config.dim // config.n_heads
        self.qkv = nn.Linear(config.dim, sum(self.heads) * head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, update=None):
        q, k, v = rearrange(self.qkv(x), "b s (h d) -> b h s d", d=self.head_dim).split(self.heads, dim=1)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)  # rope is float32, and so are these
        dtype = torch.float32 if x.device.type == "cpu" else v.dtype  # on a CPU the backward of bf16 attention is several times slower
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if update is not None:
            k, v = update(k, v)
        shared = k.shape[1] < q.shape[1]
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=shared)
        else:
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
    """Pre-norm attention, then pre-norm MLP, each added to the residual stream; or post-norm, each normed before it is added."""

    def __init__(self, config):
        super().__init__()
        self.post_norm = config.post_norm
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, h, rope, mask, update=None):
        if self.post_norm:
            h = h + self.attention_norm(self.attention(h, rope, mask, update))
            return h + self.mlp_norm(self.mlp(h))
        h = h + self.attention(self.attention_norm(h), rope, mask, update)
        return h + self.mlp(self.mlp_norm(h))


class KVCache:
    """Keys and values of the positions decoded so far; position p of a document lives in slot p, whatever it holds.

    Set with `at` which rows the next call concerns, where its tokens stand and how many slots they may look back on.
    Writing a slot again replaces it: that is how an image being denoised moves from x_t to x_{t-1} in its place.
    """

    def __init__(self, config, rows, length, device="cpu", dtype=torch.float32):
        shape = config.n_layers, rows, config.kv_heads, length, config.dim // config.n_heads
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


def weights_of(*modules, ndim=2):
    """How many weights the matrices (ndim 2) or the convolutions (ndim 4) of these modules have."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.ndim == ndim)


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
        """(N, C, H, W), (N,) -> (N, P, dim), and nothing that `decode` needs besides."""
        return self.encoder(patchify(x_t, self.config.patch_size) + self.timestep(t)[:, None]), None

    def decode(self, h, skips):
        """(N, P, dim) -> (N, C, H, W)."""
        return unpatchify(self.decoder(h), self.config.patch_size, self.config.latent_size)

    def multiplications(self):
        """Per image, on the way in and out: every weight of a matrix, as often as it is used."""
        return self.config.n_patches * weights_of(self.encoder, self.decoder) + weights_of(self.timestep)


class UNetBlock(ResBlock):
    """A residual block into which the timestep is added, as in DDPM's U-Net (Ho et al. 2020)."""

    def __init__(self, in_channels, out_channels, timestep_dim):
        super().__init__(in_channels, out_channels)
        self.timestep = nn.Linear(timestep_dim, out_channels)

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x))) + self.timestep(t)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class UNetPatches(nn.Module):
    """The paper's alternative (b): the halves of a U-Net, with the transformer between them. Residual blocks take the latents
    down to where a pixel is a patch, one halving for each factor of 2 in the patch size, and back up; each block on the way
    up also sees what its counterpart on the way down made, through a skip connection. Norms are plain group norms
    (footnote 7), without the timestep.

    The paper gives no widths. Here a level is half as wide as the one below it, so that all cost the same, and there is no
    attention, which the transformer has. The defaults make 0.27B parameters at 7B; the U-Net is the same at all sizes.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        depth, t_dim = c.patch_size.bit_length() - 1, c.unet_channels
        widths = [c.unet_channels >> (depth - level) for level in range(depth + 1)]  # level 0: the latents' resolution; the last: the patches'
        self.timestep = TimestepEmbedding(t_dim, t_dim)
        self.enter, self.down, self.up, self.leave = (nn.ModuleList() for _ in range(4))  # of every level
        for level, width in enumerate(widths):
            above = widths[max(0, level - 1)]
            self.enter.append(Downsample(above) if level else nn.Conv2d(c.latent_channels, width, 3, padding=1))
            self.down.append(nn.ModuleList(UNetBlock(width if n else above, width, t_dim) for n in range(c.unet_blocks)))
            self.up.append(nn.ModuleList(UNetBlock(2 * width, width, t_dim) for _ in range(c.unet_blocks)))
            last = nn.Conv2d(width, above if level else c.latent_channels, 3, padding=1)
            self.leave.append(nn.Sequential(nn.Upsample(scale_factor=2), last) if level else nn.Sequential(norm(width), nn.SiLU(), last))
        self.norm, self.encoder, self.decoder = norm(widths[-1]), nn.Linear(widths[-1], c.dim), nn.Linear(c.dim, widths[-1])

    def encode(self, x_t, t):
        """(N, C, H, W), (N,) -> (N, P, dim), and what `decode` needs besides: every block's output, and the timestep's embedding."""
        h, t, outputs = x_t, F.silu(self.timestep(t)), []
        for enter, blocks in zip(self.enter, self.down):
            h = enter(h)
            for block in blocks:
                h = block(h, t)
                outputs.append(h)
        return self.encoder(rearrange(self.norm(h), "n c h w -> n (h w) c")), (outputs, t)

    def decode(self, h, skips):
        """(N, P, dim), and what `encode` kept -> (N, C, H, W)."""
        outputs, t = skips
        outputs = reversed(outputs)
        h = rearrange(self.decoder(h), "n (h w) c -> n c h w", h=self.config.latent_size // self.config.patch_size)
        for blocks, leave in zip(reversed(self.up), reversed(self.leave)):
            for block in blocks:
                h = block(torch.cat([h, next(outputs)], dim=1), t)
            h = leave(h)
        return h

    def multiplications(self):
        """Per image, on the way in and out: every weight of a matrix, as often as it is used; of a convolution, at every pixel."""
        pixels = [(self.config.latent_size >> level) ** 2 for level in range(len(self.down))]
        n = self.config.n_patches * weights_of(self.encoder, self.decoder) + weights_of(self.timestep)
        for level, (enter, down, up, leave) in enumerate(zip(self.enter, self.down, self.up, self.leave)):
            n += pixels[level] * weights_of(enter, down, up, ndim=4) + weights_of(down, up) + pixels[max(0, level - 1)] * weights_of(leave, ndim=4)
        return n


class Transfusion(nn.Module):
    """One transformer over tokens and patches; see the drawing at the top of the file."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.patches = None if config.images == "discrete" else UNetPatches(config) if config.patch_encoder == "unet" else LinearPatches(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.checkpoint_activations = False  # True: keep each block's input only, and run the block again in the backward pass
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)  # untied from the embedding
        self.apply(self._init)
        for block in self.blocks:  # 2 n_layers outputs are added to the residual stream: its variance shall not grow with depth (GPT-2)
            for linear in (block.attention.out, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.n_layers))
        if isinstance(self.patches, UNetPatches):  # the up blocks see this beside skip connections of standard deviation 1
            nn.init.normal_(self.patches.decoder.weight, std=config.dim**-0.5)
        if config.post_norm:  # what is added is as large as the norms' weights, whatever the matrices: so scale these, beside a stream of 1
            nn.init.normal_(self.embedding.weight)
            for block in self.blocks:
                for last in (block.attention_norm, block.mlp_norm):
                    nn.init.constant_(last.weight, 1 / math.sqrt(2 * config.n_layers))

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(self, tokens, image_id, x_t, t):
        """Tokens and noised images -> the input of the trunk (B, S, dim); where its patches are: (N P,) indices into the
        flattened B S positions, in reading order; and the skip connections to their decoder."""
        h = self.embedding(tokens).float()  # the residual stream stays in float32, whatever the weights are kept in
        is_patch = image_id >= 0
        # A stable sort brings the patches to the front in reading order; unlike boolean indexing, its shape is known ahead.
        slots = torch.argsort(~is_patch.flatten(), stable=True)[: x_t.shape[0] * self.config.n_patches]
        patches, skips = self.patches.encode(x_t, t)
        return h.flatten(0, 1).index_copy(0, slots, patches.to(h.dtype).flatten(0, 1)).view_as(h), slots, skips

    def trunk(self, h, positions, mask=None, cache=None):
        """The shared blocks and the final norm: h (B, S, dim), positions (B, S) -> (B, S, dim). mask: bool, True = may
        attend, broadcastable to (B, 1, S, keys), or a BlockMask. With a cache, the keys are its visible slots."""
        rope = rope_table(positions, self.config.dim // self.config.n_heads, self.config.rope_theta, self.config.rope_scaling)
        for layer, block in enumerate(self.blocks):
            if cache is not None:
                h = block(h, rope, mask, partial(cache.update, layer))
            elif self.checkpoint_activations and self.training:
                h = checkpoint(block, h, rope, mask, use_reentrant=False)
            else:
                h = block(h, rope, mask)
        return self.norm(h)

    def forward(self, tokens, image_id, positions, mask, x_t=None, t=None):
        """A mixed batch, as in training.

        tokens, image_id, positions: (B, S), as in data.Batch; mask: transfusion_mask (B, 1, S, S) or flex_mask of attention_mask.py
        x_t: (N, C, H, W), the noised latents of the batch's images in reading order; t: (N,), their timesteps, 0 = clean
        Returns logits (B, S, vocab_size) and the prediction for each image (N, C, H, W). A discrete model has its images among the
        tokens: it returns x_t as it is.
        """
        if self.patches is None:
            return self.head(self.trunk(self.embedding(tokens).float(), positions, mask)), x_t
        h, slots, skips = self.embed(tokens, image_id, x_t, t)
        h = self.trunk(h, positions, mask)
        patches = h.flatten(0, 1)[slots].unflatten(0, (-1, self.config.n_patches))
        return self.head(h), self.patches.decode(patches, skips)


# ---- What a size costs ----------------------------------------------------------------------------------------------


def training_flops(model, context, images=0.0):
    """FLOPs of a training step per position, forward and backward; context: how many positions a position sees, on average;
    images: how many there are per position.

    A matrix of n weights costs a position n multiplications and n additions, 2n, forward; backward twice that (a gradient
    for its input, one for itself): 6n. The matrices are those of the blocks and the head, and for each image those of its
    ways in and out; the embedding is a look-up. Attention compares a query with `context` keys and sums as many values,
    each dim wide: 2 (dim + dim) context a layer forward, three times that in all.
    """
    c = model.config
    of_images = images * model.patches.multiplications() if model.patches else 0
    return 6 * (weights_of(model.blocks, model.head) + of_images) + 12 * c.n_layers * c.dim * context


def mean_context(batch, n_patches):
    """How many positions a position of the batch attends to, on average: all before it in its document and itself, and for a
    patch also those after it in its image, which are (n_patches - 1) / 2 on average. n_patches: 1 if images are read causally."""
    return float((batch.positions + 1).float().mean() + (batch.image_id >= 0).float().mean() * (n_patches - 1) / 2)


def training_memory(model, gpus, rows, seq_len, checkpoint_activations=False):
    """Bytes a GPU needs to train, roughly: {part: bytes}. One GPU holds everything; more share the weights (--fsdp).

    Weights, gradients, AdamW's two moments and the averaged weights are float32. Gradients are whole on every GPU: they
    travel, and are cut, in the last micro-batch only (of one micro-batch a step, 4 n / gpus would do). Matrix products read
    bfloat16 copies of the weights: one GPU has all but the embedding's, made by autocast; those that share have gathered
    what is outside the blocks, the block at work and the next. Kept for the backward pass are, per
    position and block: the residual stream at both norms (float32), both norms' outputs, q, k, v, and attention's output
    twice, gate, up and their product (bfloat16); for the head the logits and their softmax (float32, and bfloat16).
    """
    c, n, of_block = model.config, sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.blocks[0].parameters())
    copied = n - model.embedding.weight.numel() if gpus == 1 else n - max(0, c.n_layers - 2) * of_block
    per_block = 4 * c.dim if checkpoint_activations else 2 * 4 * c.dim + 2 * 2 * c.dim + 2 * 3 * c.dim + 2 * 2 * c.dim + 2 * 4 * c.mlp_dim
    activations = rows * seq_len * (c.n_layers * per_block + (4 + 4 + 2) * c.vocab_size)
    return {"weights": 4 * n / gpus, "copies": 2 * copied, "gradients": 4 * n, "optimiser": 8 * n / gpus, "average": 4 * n / gpus, "activations": activations}


# Dense bfloat16, from NVIDIA's data sheets, by a part of the device's name.
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H200 NVL": 835e12, "H200": 989e12, "A100": 312e12}


def peak_flops(device):
    """The FLOP/s that a bfloat16 run's MFU is measured against, or None if there is no figure for this device, or it is a slice of one (MIG)."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name and "MIG" not in name), None)


# ---- Starting from Llama --------------------------------------------------------------------------------------------


def inspect_llama(folder):
    """What a Llama's folder holds -> the fields of TransfusionConfig that it settles, whether its head is its embedding, and its
    files of weights. Raises ValueError, naming the file, if one is missing, or it is no Llama or one whose block is not ours."""
    path, settings = Path(folder) / "config.json", read_json(Path(folder) / "config.json")
    # transformers 5 writes rope_parameters, those before it rope_theta and rope_scaling.
    rope = {"rope_theta": settings.get("rope_theta", 10000.0)}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(settings.get(name) or {}, dict):
            raise ValueError(f"{path}: {name} is {settings[name]!r}; it must be an object")
        rope |= settings.get(name) or {}
    stretch = rope.get("rope_type", rope.get("type", "default"))
    wanted = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    odd = [name for name, value in wanted.items() if settings.get(name, value if name != "model_type" else None) != value]
    if odd or stretch not in ("default", "llama3"):
        what = f"{odd[0]} is {settings.get(odd[0])!r}" if odd else f"RoPE is stretched by the method {stretch!r}"
        raise ValueError(f"{path}: {what}; it must be a Llama without biases, with RoPE as it is or as in Llama 3")
    try:
        sizes = dict(
            dim=settings["hidden_size"], n_layers=settings["num_hidden_layers"], n_heads=settings["num_attention_heads"],
            n_kv_heads=settings.get("num_key_value_heads") or 0, mlp_width=settings["intermediate_size"], vocab_size=settings["vocab_size"],
            norm_eps=settings.get("rms_norm_eps", 1e-6), rope_theta=rope["rope_theta"], qk_norm=False, post_norm=False,
            rope_scaling=tuple(rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
            if stretch == "llama3" else (),
        )  # fmt: skip
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}") from None
    for name in ("dim", "n_layers", "n_heads", "mlp_width", "vocab_size", "n_kv_heads"):
        if type(sizes[name]) is not int or sizes[name] < (name != "n_kv_heads"):
            raise ValueError(f"{path}: gives {sizes[name]!r} as the model's {name}; it must be a whole number above 0")
    for name, value in (("norm_eps", sizes["norm_eps"]), ("rope_theta", sizes["rope_theta"]), *(("rope_scaling", value) for value in sizes["rope_scaling"])):
        if type(value) not in (int, float) or not value > 0:
            raise ValueError(f"{path}: gives {value!r} as the model's {name}; it must be a number above 0")
    if settings.get("head_dim") not in (None, sizes["dim"] // sizes["n_heads"]):
        raise ValueError(f"{path}: head_dim is {settings['head_dim']}; only hidden_size / num_attention_heads can be read")
    index, files = path.with_name("model.safetensors.index.json"), [path.with_name("model.safetensors")]
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{index}: its weight_map must name a file for every weight")
        files = [path.with_name(name) for name in sorted(set(shards.values()))]
    for file in files:
        if not file.exists():
            raise ValueError(f"{file}: no such file" + (f", but {index.name} names it; all {len(files)} shards are needed" if index.exists() else ""))
    return sizes, settings.get("tie_word_embeddings", False), files


@torch.no_grad()
def load_llama(path, config=None, new_tokens=0):
    """A Llama 2 or 3 in Hugging Face's format -> Transfusion whose text logits are its own.

    path: folder with config.json and model.safetensors, or the shards that model.safetensors.index.json names
    config: TransfusionConfig of what Llama has no say in, patches and latents; default: the paper's
    new_tokens: rows appended to the vocabulary, for <BOI> and the like
    These rows and the ways in and out of patches are drawn anew. <BOS> and <EOS> are among them: the Llama's own begin and end of
    text stay in the vocabulary, unused, so what it knows of where texts begin and end must be learned again. A head that was
    tied to the embedding becomes a copy of it: ours are untied. Raises ValueError, naming the file that is missing, broken or of
    other sizes than config.json says.
    """
    sizes, tied, files = inspect_llama(path)
    n_tokens = sizes["vocab_size"]
    model = Transfusion(replace(config or TransfusionConfig(), **sizes | dict(vocab_size=n_tokens + new_tokens)))
    places = {"model.embed_tokens": model.embedding.weight[:n_tokens], "model.norm": model.norm.weight}  # their layer -> our weight, or a slice of it
    if not tied:
        places["lm_head"] = model.head.weight[:n_tokens]
    for n, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.split([heads * block.attention.head_dim for heads in block.attention.heads])
        gate, up = block.mlp.gate_up.weight.chunk(2)
        places |= {f"model.layers.{n}.{name}": place for name, place in {
            "input_layernorm": block.attention_norm.weight, "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention.out.weight, "post_attention_layernorm": block.mlp_norm.weight,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": block.mlp.down.weight,
        }.items()}  # fmt: skip
    for file in files:
        for name, weight in read_safetensors(file).items():
            layer = name.removesuffix(".weight")
            if layer not in places:
                if "rotary_emb" in name or (tied and layer == "lm_head"):  # a table that we compute; the embedding once more
                    continue
                raise ValueError(f"{file}: {name} has no place in a Llama of the sizes in config.json")
            if weight.shape != places[layer].shape:
                raise ValueError(f"{file}: {name} is of shape {tuple(weight.shape)}, but of {tuple(places[layer].shape)} by config.json")
            places.pop(layer).copy_(weight)
    if places:
        raise ValueError(f"{path}: {len(places)} weights are missing, such as {min(places)}.weight")
    if tied:
        model.head.weight[:n_tokens] = model.embedding.weight[:n_tokens]
    return model


def freeze_text(model, new_tokens):
    """Leave to training only what a Llama lacks: the ways in and out of patches, and the last `new_tokens` rows of embedding
    and head. Returns how many parameters that is. The optimiser must not decay embedding and head: that moves frozen rows."""
    partly = {"embedding.weight", "head.weight"} if new_tokens else set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("patches.") or name in partly)
        if name in partly:
            old = torch.arange(len(parameter))[:, None] < len(parameter) - new_tokens
            parameter.register_hook(lambda gradient, old=old: gradient.masked_fill(old.to(gradient.device), 0))
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith("patches.")) + len(partly) * new_tokens * model.config.dim


if __name__ == "__main__":
    context, tokens, mfu, peak = (4096 + 1) / 2, 0.5e12, 0.5, 989e12
    print("  size   layers   dim  heads    MLP |  blocks  embedding + head  sum (B) | linear   U-Net | GFLOPs/token | days of one H100")
    models = {}
    for name, size in SIZES.items():
        with torch.device("meta"):  # shapes without storage
            model = models[name] = Transfusion(TransfusionConfig(**size))
            unet = UNetPatches(TransfusionConfig(**size, patch_encoder="unet"))
        parts = {"blocks": model.blocks, "embedding": model.embedding, "head": model.head, "linear": model.patches, "unet": unet}
        count = {name: sum(p.numel() for p in part.parameters()) / 1e9 for name, part in parts.items()}
        c, flops = model.config, training_flops(model, context)
        llama = count["blocks"] + count["embedding"] + count["head"]
        print(f"{name:>6}  {c.n_layers:6}  {c.dim:5}  {c.n_heads:5}  {c.mlp_dim:5} | {count['blocks']:7.3f}  {llama - count['blocks']:16.3f}"
              f"  {llama:7.3f} | {count['linear']:6.4f}  {count['unet']:6.4f} | {flops / 1e9:12.2f} | {tokens * flops / (mfu * peak) / 86400:15,.0f}")  # fmt: skip
    print("linear, U-Net: billions of parameters in the ways in and out of patches, for patches of 2 x 2.")
    print("GFLOPs/token: forward and backward, sequences of 4096, plain causal attention. Days: the paper's 0.5T tokens at 50 % MFU of 989 TFLOP/s")
    print("(dense bfloat16 of an H100 or H200); divide by the number of GPUs.\n")
    print("GB per GPU, one row of 4096 tokens at a time; weights, optimiser and average are shared by all GPUs (--fsdp), gradients only once they are")
    print("summed over the micro-batches of a step. copies: of weights, in bfloat16. In brackets: with --checkpoint_activations")
    print("  size  GPUs | weights  copies  gradients  optimiser  average |   activations |           total")
    for name, model in models.items():
        for gpus in (1, 8, 64):
            kept, again = (training_memory(model, gpus, 1, 4096, checkpointed) for checkpointed in (False, True))
            cells = "  ".join(f"{kept[part] / 1e9:{width}.1f}" for part, width in (("weights", 7), ("copies", 6), ("gradients", 9), ("optimiser", 9), ("average", 7)))
            print(f"{name:>6}  {gpus:4} | {cells} | {kept['activations'] / 1e9:5.1f} ({again['activations'] / 1e9:5.1f}) | {sum(kept.values()) / 1e9:6.1f} ({sum(again.values()) / 1e9:6.1f})")
