"""The paper's alternative (b) for the ways in and out of patches: the two halves of a U-Net (section 3)."""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from extras.costs import weights_of
from model import TimestepEmbedding, Transfusion
from vae import Downsample, ResBlock, VAEConfig


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel: (N, C, H, W) -> (N, C, H, W)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


NORMS = {"layer": partial(LayerNorm, eps=1e-6), "group": VAEConfig().norm}


class UNetBlock(ResBlock):
    """A residual block into which the timestep is added, as in DDPM's U-Net (Ho et al. 2020)."""

    def __init__(self, in_channels, out_channels, timestep_dim, norm=NORMS["group"]):
        super().__init__(in_channels, out_channels, norm)
        self.timestep = nn.Linear(timestep_dim, out_channels)

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x))) + self.timestep(t)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class UNetPatches(nn.Module):
    """Residual blocks take latents down to where a pixel is a patch, and the transformer's output up again.

    A level is half as wide as the one below it, so that all cost the same; the paper gives no widths. Each
    block on the way up also sees what its counterpart on the way down made. Norms do not depend on t;
    regular layer norms are the paper's (footnote 7). channels: width of the lowest level; blocks: on a level,
    each way; norms: layer or group.
    """

    def __init__(self, config, channels, blocks, norms="layer"):
        super().__init__()
        self.config = c = config
        norm = NORMS[norms]
        depth = c.patch_size.bit_length()  # one halving for each factor of 2
        widths = [channels >> level for level in reversed(range(depth))]  # level 0 is the latents'
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        self.timestep = TimestepEmbedding(channels, channels)
        self.enter, self.down, self.up, self.leave = (nn.ModuleList() for _ in range(4))  # of every level
        for level, width in enumerate(widths):
            above = widths[level - 1] if level else width
            ins = [above, *[width] * (blocks - 1)]
            self.enter.append(Downsample(above) if level else conv(c.latent_channels, width))
            self.down.append(nn.ModuleList(UNetBlock(before, width, channels, norm) for before in ins))
            self.up.append(nn.ModuleList(UNetBlock(2 * width, width, channels, norm) for _ in range(blocks)))
            if level:
                leave = [nn.Upsample(scale_factor=2), conv(width, above)]
            else:
                leave = [norm(width), nn.SiLU(), conv(width, c.latent_channels)]
            self.leave.append(nn.Sequential(*leave))
        self.norm = norm(channels)
        self.encoder = nn.Linear(channels, c.dim)
        self.decoder = nn.Linear(c.dim, channels)

    def encode(self, x_t, t):
        """(N, C, H, W), (N,) -> (N, P, dim), and for `decode` all outputs and the timestep's embedding."""
        h, t, outputs = x_t, F.silu(self.timestep(t)), []
        for enter, blocks in zip(self.enter, self.down):
            h = enter(h)
            for block in blocks:
                h = block(h, t)
                outputs.append(h)
        return self.encoder(rearrange(self.norm(h), "n c h w -> n (h w) c")), (outputs, t)

    def decode(self, h, kept):
        """(N, P, dim), and what `encode` kept -> (N, C, H, W)."""
        outputs, t = reversed(kept[0]), kept[1]
        side = self.config.latent_size // self.config.patch_size
        h = rearrange(self.decoder(h), "n (h w) c -> n c h w", h=side)
        for blocks, leave in zip(reversed(self.up), reversed(self.leave)):
            for block in blocks:
                h = block(torch.cat([h, next(outputs)], dim=1), t)
            h = leave(h)
        return h

    def multiplications(self):
        """What the levels cost an image: a convolution's weights are used at every pixel, a matrix's once."""
        n = 0
        for level, (enter, down, up, leave) in enumerate(zip(self.enter, self.down, self.up, self.leave)):
            pixels = (self.config.latent_size >> level) ** 2
            above = 4 * pixels if level else pixels
            n += pixels * weights_of(enter, down, up, ndim=4) + above * weights_of(leave, ndim=4)
            n += weights_of(down, up)
        return n


def check_widths(patch_size, channels):
    """Raises ValueError unless every level's width is a whole number that groups of four channels divide."""
    if patch_size & (patch_size - 1):
        wanted = "a U-Net halves the resolution, so it must be 1, 2, 4, 8 or another power of two"
        raise ValueError(f"patch_size is {patch_size}; {wanted}")
    if channels % (4 * patch_size):
        wanted = f"with patch_size {patch_size} it must be a multiple of {4 * patch_size}"
        raise ValueError(f"unet_channels is {channels}; {wanted}")


def unet_transfusion(config, channels, blocks, norms="layer"):
    """A Transfusion with these ways in and out, and random weights."""
    check_widths(config.patch_size, channels)
    model = Transfusion(config, partial(UNetPatches, channels=channels, blocks=blocks, norms=norms))
    # The blocks on the way up see this beside outputs of standard deviation 1 of those on the way down.
    nn.init.normal_(model.patches.decoder.weight, std=config.dim**-0.5)
    return model
