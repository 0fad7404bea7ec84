"""The autoencoder that turns pictures into the latents that are diffused (paper, section 4.1 and appendix A).

A convolutional KL-VAE as in latent diffusion (Esser et al. 2021; Rombach et al. 2022): 256x256x3 -> 32x32x8. Its loss is

    L1 + LPIPS + 0.5 GAN (patch discriminator, from `disc_start` on, with an adaptive weight) + 1e-6 KL

with latent diffusion's reduction, on which those weights depend: L1 and KL are *summed* over the elements of a picture
and averaged over the batch. The paper's further term on MoCo v2 features is left out: no package carries those weights.
Trains in float32: half precision gives NaNs here. Each latent channel is standardised by statistics that are measured
after training and stored with the weights, so that the diffusion sees mean 0 and variance 1.

With `codebook` it is the paper's baseline, a VQ-VAE (van den Oord et al. 2017): the same encoder and decoder, but every latent
pixel becomes the nearest of so many learned vectors, whose number is its code. 0.25 times the commitment loss, which keeps
the encoder's outputs near those vectors, takes the place of the KL.

Exports `VAEConfig`, `VAE`, `train_vae`, and the blocks of which model.py makes its U-Net; checkpoints (`save_checkpoint`,
`load_checkpoint`, `load_vae`) and other people's weights (`load_pretrained`) come last, and a reader of the paper can skip them.
`python vae.py --config small` trains one alone and writes reconstructions; with `--data PATH --encode FOLDER` it encodes
all pictures once, so that training need not: at 256x256 the encoder costs as much as a small transformer.
"""

import hashlib
import itertools
import json
import math
import os
import re
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


@dataclass
class VAEConfig:
    """The autoencoder's sizes and its training; the defaults are latent diffusion's f8 with 8 channels."""

    channels: int = 128
    channel_multiples: tuple = (1, 2, 4, 4)  # per level; each level after the first halves the resolution
    n_res: int = 2  # residual blocks per level (one more in the decoder)
    latent_channels: int = 8
    unshuffle: int = 1  # pixels a side folded into channels before the first convolution: cheap downsampling for small models
    mid_attention: bool = True
    quant_convs: bool = False  # 1x1 convolutions on both sides of the latents, which pretrained ones may have
    norm_groups: int = 0  # of every group norm; 0 = 32, fewer where there are fewer channels
    kl_weight: float = 1e-6
    codebook: int = 0  # vectors of a VQ-VAE (the paper's has 16384); 0 = a KL-VAE
    # Of the commitment loss summed over a picture, as L1 is. The 0.25 of VQ-VAE is of means over elements, beside L1 3 H W / (C h w) times
    # as strong: 12 times in chameleon, which then reconstructs worse (error 0.058 of the range, not 0.049, after 600 steps; two seeds).
    commitment_weight: float = 0.25
    perceptual_weight: float = 1.0  # LPIPS, when the package lpips is installed
    disc_weight: float = 0.5
    disc_start: int = 50_000  # step from which the discriminator plays; beyond `steps`: never
    steps: int = 1_000_000
    batch: int = 32
    lr: float = 1e-4
    warmup: int = 1000

    def __post_init__(self):
        self.channel_multiples = tuple(self.channel_multiples)  # JSON has lists

    @property
    def factor(self):
        """Pixels per latent pixel, a side."""
        return self.unshuffle * 2 ** (len(self.channel_multiples) - 1)


# ---- The network ----------------------------------------------------------------------------------------------------


def norm(channels):
    """Group norm with latent diffusion's 32 groups, fewer where there are fewer channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after norm and SiLU, beside a skip connection."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class MidAttention(nn.Module):
    """Single-head attention over all latent pixels, at the lowest resolution."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (N, H W, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Conv2d):
    """Halve the resolution; padded right and below only, as in latent diffusion."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def middle(channels, attention):
    """The two residual blocks at the lowest resolution, with attention between them."""
    return [ResBlock(channels, channels), *([MidAttention(channels)] if attention else []), ResBlock(channels, channels)]


def encoder(c):
    """Pictures (N, 3, H, W) -> mean and log-variance (N, 2 latent_channels, H/f, W/f); of a VQ-VAE (N, latent_channels, H/f, W/f)."""
    out = c.latent_channels if c.codebook else 2 * c.latent_channels
    layers = [nn.PixelUnshuffle(c.unshuffle), nn.Conv2d(3 * c.unshuffle**2, c.channels, 3, padding=1)]
    width = c.channels
    for level, multiple in enumerate(c.channel_multiples):
        if level:
            layers.append(Downsample(width))
        for _ in range(c.n_res):
            layers.append(ResBlock(width, c.channels * multiple))
            width = c.channels * multiple
    layers += middle(width, c.mid_attention)
    layers += [norm(width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)]
    return nn.Sequential(*layers, *([nn.Conv2d(out, out, 1)] if c.quant_convs else []))


def decoder(c):
    """Latents (N, latent_channels, h, w) -> pictures (N, 3, f h, f w)."""
    width = c.channels * c.channel_multiples[-1]
    layers = [nn.Conv2d(c.latent_channels, c.latent_channels, 1)] if c.quant_convs else []
    layers += [nn.Conv2d(c.latent_channels, width, 3, padding=1), *middle(width, c.mid_attention)]
    for level, multiple in enumerate(reversed(c.channel_multiples)):
        if level:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
        for _ in range(c.n_res + 1):
            layers.append(ResBlock(width, c.channels * multiple))
            width = c.channels * multiple
    return nn.Sequential(*layers, norm(width), nn.SiLU(), nn.Conv2d(width, 3 * c.unshuffle**2, 3, padding=1), nn.PixelShuffle(c.unshuffle))


class Codebook(nn.Module):
    """K vectors, moved in training towards the latents that are nearest to each: an online k-means (van den Oord et al. 2017,
    appendix A.1). A dead one, that hardly any latent is nearest to, is put where some latent of the batch is; they all begin so."""

    DECAY = 0.99
    DEAD = 0.01  # of the latents that each vector would get if all got equally many

    def __init__(self, size, channels):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, channels))
        self.register_buffer("counts", torch.zeros(size))  # how many latents of a batch are nearest to each, a moving average

    def nearest(self, z):
        """Latents (M, C) -> the numbers of the vectors nearest to them (M,) int64."""
        return torch.addmm(self.vectors.square().sum(1), z, self.vectors.T, alpha=-2).argmin(1)  # |z - v|^2, without |z|^2; one (M, K) matrix

    @torch.no_grad()
    def forward(self, z, generator=None):
        """Latents (N, C, h, w) -> the nearest vectors, in the same shape, and their codes (N, h, w) int64. In training mode the
        codebook learns from it; generator: draws which latents revive the dead."""
        flat = z.movedim(1, -1).flatten(0, 2)
        if self.training:
            self.revive(flat, generator)
        codes = self.nearest(flat).view(z[:, 0].shape)
        found = self.look_up(codes)
        if self.training:
            self.learn(flat, codes.flatten())
        return found, codes

    def look_up(self, codes):
        """(N, h, w) -> (N, C, h, w)."""
        return self.vectors[codes].movedim(-1, 1)

    def revive(self, z, generator=None):
        share = len(z) / len(self.counts)
        dead = self.counts < self.DEAD * share
        chosen = torch.randint(len(z), dead.shape, generator=generator, device=z.device)
        self.vectors.copy_(torch.where(dead[:, None], z[chosen], self.vectors))
        self.counts[dead] = share  # time to prove themselves

    def learn(self, z, codes):
        sums = self.vectors * self.counts[:, None]
        sums.lerp_(torch.zeros_like(sums).index_add_(0, codes, z), 1 - self.DECAY)
        self.counts.lerp_(torch.bincount(codes, minlength=len(self.counts)).float(), 1 - self.DECAY)
        self.vectors.copy_(sums / self.counts[:, None])


def codebook_usage(counts):
    """How often each code occurs (K,) -> share of the codes that do, and their perplexity, to how many equally frequent ones it comes."""
    p = counts.double() / counts.sum()
    return float((p > 0).double().mean()), float(torch.special.entr(p).sum().exp())


def sample_posterior(mean, log_var, noise):
    """A draw from the Gaussian posterior, differentiable in its parameters (Kingma & Welling 2014); all (N, C, h, w)."""
    return mean + (0.5 * log_var).exp() * noise


class VAE(nn.Module):
    """Encoder, decoder and the statistics of the latents; of a VQ-VAE also the codebook."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = encoder(config), decoder(config)
        for module in self.modules() if config.norm_groups else ():
            if isinstance(module, nn.GroupNorm):
                if module.num_channels % config.norm_groups:
                    raise ValueError(f"norm_groups is {config.norm_groups}; it must divide the channels, {module.num_channels}")
                module.num_groups = config.norm_groups
        self.codebook = Codebook(config.codebook, config.latent_channels) if config.codebook else None
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def posterior(self, pixels):
        """q(z | x), not standardised: (N, 3, H, W) in -1..1 -> mean and log-variance, each (N, C, H/f, W/f). Of a VQ-VAE it is a
        single point, the nearest vector of the codebook."""
        if self.codebook is not None:
            mean, _ = self.codebook(self.encoder(pixels))
            return mean, torch.full_like(mean, -torch.inf)
        mean, log_var = self.encoder(pixels).chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    @torch.no_grad()
    def encode(self, pixels, noise=None):
        """Standardised latents (N, C, H/f, W/f): the posterior's mean, or a draw from it if noise of that shape is given."""
        return self.to_latents(*self.posterior(pixels), noise)

    def to_latents(self, mean, log_var, noise=None):
        """The second half of `encode`: from the posterior to standardised latents."""
        z = mean if noise is None else sample_posterior(mean, log_var, noise)
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    @torch.no_grad()
    def decode(self, latents):
        """Pictures (N, 3, H, W) in -1..1 from standardised latents."""
        return self.decoder(latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]).clamp(-1, 1)

    @torch.no_grad()
    def codes(self, pixels):
        """What a VQ-VAE makes of pictures (N, 3, H, W) in -1..1: (N, H/f, W/f) int64, each 0..codebook-1."""
        return self.codebook(self.encoder(pixels))[1]

    @torch.no_grad()
    def decode_codes(self, codes):
        """Pictures (N, 3, H, W) in -1..1 from a VQ-VAE's codes (N, H/f, W/f)."""
        return self.decoder(self.codebook.look_up(codes)).clamp(-1, 1)


class PatchDiscriminator(nn.Sequential):
    """pix2pix's discriminator (Isola et al. 2017): a logit for every patch of the picture."""

    def __init__(self, width=64, n_layers=3):
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [width * min(2**i, 8) for i in range(n_layers + 1)]
        for i, (a, b) in enumerate(zip(widths, widths[1:]), 1):
            layers += [nn.Conv2d(a, b, 4, stride=2 if i < n_layers else 1, padding=1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))


# ---- Training -------------------------------------------------------------------------------------------------------


def reconstruction_loss(pixels, output, config, perceptual=None):
    """L1 (+ LPIPS), summed over a picture and averaged over the batch."""
    error = (pixels - output).abs()
    if perceptual is not None:
        error = error + config.perceptual_weight * perceptual(pixels, output)  # (N, 1, 1, 1): counts at every element, as in latent diffusion
    return error.sum() / len(pixels)


def draw_latents(vae, pixels, generator=None):
    """What the decoder is trained on, and what holds it in shape -> latents (N, C, h, w) with a gradient, and a scalar, summed over
    a picture and averaged over the batch. KL: a draw of the posterior, and its divergence from the standard normal. VQ: the
    nearest vectors, whose gradient goes to the encoder's outputs as if they were these, and the commitment loss."""
    if vae.codebook is not None:
        z = vae.encoder(pixels)
        nearest, _ = vae.codebook(z, generator)
        return z + (nearest - z).detach(), (z - nearest).square().sum() / len(z)
    mean, log_var = vae.posterior(pixels)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var)
    return sample_posterior(mean, log_var, noise), kl.sum() / len(mean)


def adaptive_weight(reconstruction, adversarial, last_layer):
    """How much to scale the GAN's gradient so that it is as large as the reconstruction's at the decoder's last layer
    (Esser et al. 2021, eq. 7)."""
    by_rec, by_gan = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial))
    return (by_rec / (by_gan + 1e-4)).clamp(0, 1e4).detach()


def load_perceptual(device):
    """LPIPS (Zhang et al. 2018) if its optional package and weights are at hand, else None, with a line that says so."""
    try:
        import lpips

        return lpips.LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    except Exception as error:  # not installed, or its VGG weights cannot be fetched
        print(f"training the VAE without LPIPS ({type(error).__name__}); `pip install lpips` gives it")
        return None


@torch.no_grad()
def measure_statistics(vae, pictures, batch):
    """Measure the statistics of the latents on some 2048 pictures, `batch` at a time; `pictures` as for train_vae."""
    device, z = vae.latent_mean.device, []
    for i in range(max(1, 2048 // batch)):  # draws, not means: a channel that carries little is mostly the posterior's own noise
        mean, log_var = vae.posterior(pictures(i * batch, batch).to(device))
        z.append(sample_posterior(mean, log_var, torch.randn_like(mean)))
    z = torch.cat(z)
    vae.latent_mean.copy_(z.mean((0, 2, 3)))
    vae.latent_std.copy_(z.std((0, 2, 3)))


def count_codes(vae, pictures, batch):
    """How often a VQ-VAE uses each of its codes (K,) in some 2048 pictures; arguments as for measure_statistics."""
    codes = torch.cat([vae.codes(pictures(i * batch, batch).to(vae.latent_mean.device)).flatten() for i in range(max(1, 2048 // batch))])
    return torch.bincount(codes, minlength=vae.config.codebook)


def train_vae(config, pictures, path, seed=0, device="cpu", resume=False, save_every=5000, interrupted=lambda: False):
    """Train a VAE and measure its latents' statistics; of a VQ-VAE also how many codes it uses, which the checkpoint keeps.

    pictures(first, n): float32 (n, 3, H, W) in -1..1, pictures number first..first+n-1 of the training data
    path: where the checkpoint goes; resume=True goes on from the one that is there
    interrupted(): asked after every step; if true, the checkpoint is written and KeyboardInterrupt raised
    Returns the VAE in eval mode. Raises FloatingPointError if the loss is not finite.
    """
    torch.manual_seed(seed)
    vae, disc = VAE(config).to(device), PatchDiscriminator().to(device)
    vae = vae.to(memory_format=torch.channels_last)
    with_disc = config.disc_start < config.steps and config.disc_weight > 0
    perceptual = load_perceptual(device) if config.perceptual_weight > 0 else None
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.5, 0.95), weight_decay=0.0, fused=True)
    disc_optimizer = torch.optim.AdamW(disc.parameters(), lr=config.lr, betas=(0.5, 0.95), weight_decay=0.0, fused=True)
    parts = {"vae": vae, "disc": disc, "optimizer": optimizer, "disc_optimizer": disc_optimizer}
    step = 0
    if resume and Path(path).exists():
        state = load_checkpoint(path)
        step = state["step"]
        for name, part in parts.items():
            if name in state:
                part.load_state_dict(state[name])

    def save(**more):
        """Write the checkpoint, `step` being the number of steps done."""
        state = {name: part.state_dict() for name, part in parts.items() if with_disc or not name.startswith("disc")}
        save_checkpoint(path, {"vae_config": asdict(config), "step": step, **state, **more})

    bar = tqdm(range(step, config.steps), desc="VAE", initial=step, total=config.steps, mininterval=1)
    for _ in bar:
        # Linear warm-up, then a cosine to zero.
        now = config.lr * min((step + 1) / config.warmup, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups + disc_optimizer.param_groups:
            group["lr"] = now
        x = pictures(step * config.batch, config.batch).to(device, memory_format=torch.channels_last)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        z, regulariser = draw_latents(vae, x, generator)
        output = vae.decoder(z)
        rec = reconstruction_loss(x, output, config, perceptual)
        loss = rec + (config.commitment_weight if config.codebook else config.kl_weight) * regulariser
        if with_disc and step >= config.disc_start:
            adversarial = -disc(output).mean()
            weight = adaptive_weight(rec, adversarial, vae.decoder[-2].weight)
            loss = loss + config.disc_weight * weight * adversarial
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(vae.parameters(), 1e4)
        if not math.isfinite(loss.item() + norm.item()):  # before the weights are touched
            raise FloatingPointError(f"the VAE's loss is {loss.item():g} and its gradient's norm {norm.item():g} at step {step}: lower --vae_lr (now {config.lr:g})")
        optimizer.step()
        if with_disc and step >= config.disc_start:
            hinge = F.relu(1 - disc(x)).mean() + F.relu(1 + disc(output.detach())).mean()
            disc_optimizer.zero_grad(set_to_none=True)
            (0.5 * hinge).backward()
            disc_optimizer.step()
        if step % 50 == 0 or step == config.steps - 1:
            more = f"KL {regulariser.item():.0f}"
            if config.codebook:
                more = f"commitment {regulariser.item():.1f}, code perplexity {codebook_usage(vae.codebook.counts)[1]:.0f}"
            bar.set_postfix_str(f"L1 {rec.item() / x[0].numel():.4f}, {more}")
        step += 1
        if step % save_every == 0:
            save()
        if interrupted():
            save()
            raise KeyboardInterrupt
    measure_statistics(vae.eval(), pictures, config.batch)
    usage = {}
    if config.codebook:
        usage = dict(zip(("codes_used", "code_perplexity"), codebook_usage(count_codes(vae, pictures, config.batch))))
        print(f"of {config.codebook:,} codes {usage['codes_used']:.1%} are used; perplexity {usage['code_perplexity']:.1f}", flush=True)
    save(done=True, **usage)
    return vae


# ---- Latents, encoded once ----------------------------------------------------------------------------------------------


def fingerprint(vae):
    """A short text that tells this VAE's weights from any other's."""
    weights = b"".join(value.detach().cpu().contiguous().numpy().tobytes() for value in vae.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


@torch.no_grad()
def write_latents(vae, sources, folder, shard=4096, batch=32):
    """Encode every picture of some data.Pairs once, for data.Latents to read: folder/0/00000.npy and so on, a folder for each
    source, float16 (pictures, 2 latent_channels, h, w): the posterior's mean and log-variance, or NaN where a picture
    cannot be read. A shard that is there already is kept, so that an interrupted run goes on. Returns how many are NaN."""
    device, broken = next(vae.parameters()).device, 0
    for number, pairs in enumerate(sources):
        place = Path(folder) / str(number)
        place.mkdir(parents=True, exist_ok=True)
        side, total = pairs.image_size // vae.config.factor, len(pairs.table.rows)
        index = {"pictures": total, "shard": shard, "image_size": pairs.image_size, "vae": fingerprint(vae)}
        if (place / "index.json").exists() and read_json(place / "index.json") != index:
            raise ValueError(f"{place}: holds latents of other pictures or of another VAE; name an empty folder")
        (place / "index.json").write_text(json.dumps(index))
        for first in tqdm(range(0, total, shard), desc=f"encode {number}"):
            file = place / f"{first // shard:05d}.npy"
            if not file.exists():
                latents = np.full((min(shard, total - first), 2 * vae.config.latent_channels, side, side), np.nan, np.float16)
                for start in range(0, len(latents), batch):
                    rows, pixels = [], []
                    for row in range(start, min(start + batch, len(latents))):
                        try:
                            pixels.append(pairs.read(first + row))
                            rows.append(row)
                        except ValueError as error:
                            tqdm.write(f"skipped: {error}", file=sys.stderr)
                    if rows:
                        x = torch.from_numpy(np.stack(pixels)).to(device).movedim(-1, 1).float() / 127.5 - 1
                        latents[rows] = torch.cat(vae.posterior(x), dim=1).clamp(-6e4, 6e4).cpu().numpy()  # float16 ends at 65504
                with open(file.with_suffix(".partial"), "wb") as partial:
                    np.save(partial, latents)
                os.replace(file.with_suffix(".partial"), file)
            broken += int(np.isnan(np.load(file, mmap_mode="r")[:, 0, 0, 0]).sum())
    return broken


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values so that `path` holds either the old checkpoint or the new one, never half
    of one. Raises OSError (disk full, not writable); the old file survives it."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be saved ({error}); what was saved there before is intact") from error


def load_checkpoint(path):
    """Read a checkpoint onto the CPU; tensors and plain values only, code in it is refused. Raises ValueError, naming the file."""
    try:  # mapped, so that the processes of a machine share one copy
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, not a checkpoint") from None
    except Exception as error:  # torch raises many kinds for broken files
        if zipfile.is_zipfile(path) and "weights_only" in str(error).lower():
            raise ValueError(f"{path}: refused, it holds more than tensors and plain values (code, perhaps)") from None
        raise ValueError(f"{path}: is not a checkpoint, or is truncated ({type(error).__name__})") from None


def load_vae(path, device="cpu"):
    """The VAE of a checkpoint written by train_vae, at its end, or train.py, or a pretrained one (`load_pretrained`), in eval mode.
    Raises ValueError, naming the file."""
    if Path(path).is_dir() or Path(path).suffix == ".safetensors":
        return load_pretrained(path).to(device)
    state = load_checkpoint(path)
    if not isinstance(state, dict) or "vae_config" not in state:
        return from_latent_diffusion(state, path).to(device)
    if "step" in state and not ("done" in state or "ema" in state):  # an unfinished one of train_vae; those of train.py hold a finished VAE
        steps = state["vae_config"]["steps"]
        raise ValueError(f"{path}: its training was stopped at step {state['step']:,} of {steps:,}; finish it first: the same command as then, with --resume")
    vae = VAE(VAEConfig(**state["vae_config"])).to(device)
    try:
        vae.load_state_dict(state["vae"])
    except RuntimeError:
        raise ValueError(f"{path}: the weights do not have the sizes of its configuration") from None
    return vae.eval()


def read_json(path):
    """A JSON file that holds an object -> dict. Raises ValueError, naming the file."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return found


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
               "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


def read_safetensors(path, keep=lambda name: True):
    """The tensors of a .safetensors file whose names pass `keep`, on the CPU -> dict. The format: the header's length (8 bytes), the
    header (JSON: each tensor's type, shape, and place after the header), the tensors' bytes. Raises ValueError, naming the file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    found = {}
    try:
        with open(path, "rb") as file:
            left = Path(path).stat().st_size - 8
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size) if size <= left else "")
            for name, about in header.items():
                if name != "__metadata__" and keep(name):
                    start, end = about["data_offsets"]
                    if not 0 <= start <= end <= left - size:
                        raise ValueError(f"{name} lies beyond its end")
                    file.seek(8 + size + start)
                    content = torch.empty(end - start, dtype=torch.uint8)
                    file.readinto(content.numpy())
                    found[name] = content.view(SAFETENSORS[about["dtype"]]).reshape(about["shape"])
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{path}: is not a safetensors file, or is truncated ({' '.join(str(error).split())[:100]})") from None
    return found


def write_safetensors(path, tensors):
    """The inverse, with the folder if need be; like save_checkpoint, the new file or the old one, never half of one. Raises
    OSError if it cannot be written."""
    path, partial, header, end = Path(path), Path(f"{path}.partial"), {"__metadata__": {"format": "pt"}}, 0
    names, tensors = {dtype: name for name, dtype in SAFETENSORS.items()}, dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # aligned
    for name, tensor in tensors.items():
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end := end + tensor.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path}: could not be saved ({error})") from error


# ---- Pretrained autoencoders ----------------------------------------------------------------------------------------

# diffusers' names -> latent diffusion's; the second group of the attention's is of diffusers before 0.18.
FROM_DIFFUSERS = [
    (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1.\2.block.\3"), (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"), (r"mid_block\.attentions\.0", "mid.attn_1"),
    ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."), (r"to_out\.0", "proj_out"), (r"query\.", "q."), (r"key\.", "k."), (r"value\.", "v."), ("proj_attn", "proj_out"),
]  # fmt: skip


def load_pretrained(path):
    """A KL autoencoder of the Stable Diffusion family, with any number of latent channels -> VAE in eval mode.

    path: a folder of diffusers' AutoencoderKL; or a file, .safetensors or of torch, with its weights or with those of the
    original latent diffusion (Rombach et al. 2022), alone or within the whole model's checkpoint.
    A folder also says how the latents are standardised; a file does not: they then stay as they are (mean 0, std 1 are
    assumed) until `measure_statistics` measures them. Raises ValueError, naming the file.
    """
    path, settings = Path(path), {}
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"{path}: is a folder without config.json; a VAE's folder must be one of diffusers' AutoencoderKL")
        settings = read_json(path / "config.json")
        if settings.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise ValueError(f"{path}: is a {settings['_class_name']}; of diffusers' autoencoders only AutoencoderKL can be read")
        path = path / "diffusion_pytorch_model.safetensors"
    state = read_safetensors(path, VAE_NAME.match) if path.suffix == ".safetensors" else load_checkpoint(path)
    return from_latent_diffusion(state, path, settings)


VAE_NAME = re.compile(r"(?:first_stage_model\.)?((?:(?:en|de)coder|(?:post_)?quant_conv)\..*)")


def layer_names(config):
    """How latent diffusion calls the layers of our encoder and decoder, in order -> two lists."""
    levels, middle = range(len(config.channel_multiples)), ["mid.block_1", *["mid.attn_1"] * config.mid_attention, "mid.block_2"]
    down, up = ["conv_in"], ["conv_in", *middle]
    for i in levels:
        down += [f"down.{i - 1}.downsample.conv"] * (i > 0) + [f"down.{i}.block.{j}" for j in range(config.n_res)]
    for i in reversed(levels):
        up += [f"up.{i + 1}.upsample.conv"] * (i < levels[-1]) + [f"up.{i}.block.{j}" for j in range(config.n_res + 1)]
    encoder, decoder = ([f"{part}.{name}" for name in [*names, "norm_out", "conv_out"]] for part, names in (("encoder", [*down, *middle]), ("decoder", up)))
    return [*encoder, *["quant_conv"] * config.quant_convs], [*["post_quant_conv"] * config.quant_convs, *decoder]


def from_latent_diffusion(state, path, settings=None):
    """Weights by their names, in latent diffusion's layout or diffusers', and the settings in diffusers' config.json -> VAE.
    The sizes are read off the weights. Raises ValueError, naming `path`, if they are no such autoencoder's."""
    settings, found = settings or {}, state.get("state_dict", state) if isinstance(state, dict) else {}
    found = {match[1]: value for name, value in found.items() if (match := VAE_NAME.match(name)) and torch.is_tensor(value)}
    if "encoder.conv_in.weight" not in found or "decoder.conv_in.weight" not in found:
        raise ValueError(f"{path}: holds no VAE; it must be a checkpoint of vae.py or train.py, or a KL autoencoder of diffusers or latent diffusion")
    of_diffusers = any("_blocks." in name for name in found)
    for pattern, name in FROM_DIFFUSERS if of_diffusers else ():
        found = {re.sub(pattern, name, key): value for key, value in found.items()}
    n_levels = len({name.split(".")[2] for name in found if name.startswith("encoder.down.")})
    if of_diffusers:  # counts the decoder's levels from the lowest resolution up, latent diffusion the other way round
        found = {re.sub(r"decoder\.up\.(\d+)", lambda m: f"decoder.up.{n_levels - 1 - int(m[1])}", name): value for name, value in found.items()}
    try:
        channels, latent_channels = len(found["encoder.conv_in.weight"]), found["decoder.conv_in.weight"].shape[1]
        for width in (len(found[f"encoder.down.{i}.block.0.conv1.bias"]) for i in range(n_levels)):
            if width % channels:
                raise ValueError(f"{path}: has {width} channels at one resolution; they must be a multiple of {channels}, those of the first")
        groups = settings.get("norm_num_groups", 32)
        if type(groups) is not int or groups < 1:
            raise ValueError(f"{path}: norm_num_groups is {groups!r} in the config.json beside it; it must be a whole number above 0")
        config = VAEConfig(
            channels=channels, channel_multiples=tuple(len(found[f"encoder.down.{i}.block.0.conv1.bias"]) // channels for i in range(n_levels)),
            n_res=len({name.split(".")[4] for name in found if name.startswith("encoder.down.0.block.")}), latent_channels=latent_channels,
            mid_attention="encoder.mid.attn_1.q.weight" in found, quant_convs="quant_conv.weight" in found, norm_groups=groups,
        )  # fmt: skip
        if settings.get("latent_channels", latent_channels) != latent_channels:
            raise ValueError(f"{path}: its latents have {latent_channels} channels, but {settings['latent_channels']} in the config.json beside it")
        vae, weights = VAE(config), {}
        for part, names in zip(("encoder", "decoder"), layer_names(config)):
            layers = [(n, layer.state_dict()) for n, layer in enumerate(getattr(vae, part)) if list(layer.parameters())]
            for (n, layer), name in zip(layers, names, strict=True):
                for key, value in layer.items():
                    theirs = f"{name}.{key.replace('skip.', 'nin_shortcut.').replace('out.', 'proj_out.')}"
                    weight = found.pop(theirs)
                    if weight.numel() != value.numel():
                        raise ValueError(f"{path}: {theirs} is of shape {tuple(weight.shape)}, not {tuple(value.shape)}: no KL autoencoder of latent diffusion")
                    weights[f"{part}.{n}.{key}"] = weight.view_as(value)  # diffusers' attention has linear layers for 1x1 convolutions
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error.args[0]}: no KL autoencoder of latent diffusion, or not all of it") from None
    if found:
        raise ValueError(f"{path}: has weights that our autoencoder has no place for, such as {min(found)}")
    vae.load_state_dict(weights, strict=False)
    try:  # what diffusers diffuses is (z - shift) * scaling, or by channel (z - mean) / std * scaling
        vae.latent_mean.copy_(torch.tensor(settings.get("latents_mean") or settings.get("shift_factor") or 0.0))
        vae.latent_std.copy_(torch.tensor(settings.get("latents_std") or 1.0) / (settings.get("scaling_factor") or 1.0))
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"{path}: the scaling of the latents in the config.json beside it must be numbers, one or {latent_channels}") from None
    return vae.eval()


if __name__ == "__main__":
    from PIL import Image

    from data import open_pairs, readable, to_pixels
    from sample import pick_device, report_errors
    from train import STOPPED, prepare_vae, read_options

    def demo():
        config, args = read_options(description="Train the VAE of a preset alone and write reconstructions.", encode="FOLDER: write the latents of --data there, for train.py --latents")
        folder = args.encode
        if folder and not config.data.data:
            raise ValueError("--encode needs --data: the built-in scenes have no end, and are encoded as they are drawn")
        if folder and config.autoencoder.codebook:
            raise ValueError("--encode writes continuous latents; leave it out with --images discrete")
        vae = prepare_vae(config, pick_device(config.device), args.resume)
        if folder:
            pairs = open_pairs(config.data)
            broken = write_latents(vae, getattr(pairs, "sources", [pairs]), folder)
            print(f"wrote {folder}" + (f"; {broken:,} pictures could not be read" if broken else ""))
            print(f"Now: python train.py ... --data {config.data.data} --latents {folder} --vae {config.vae or Path(config.out) / 'vae.pt'}")
            return
        pairs = open_pairs(config.data, "held_out")
        x = to_pixels(np.stack([pixels for _, pixels in readable(pairs, itertools.count(), 16)])).to(next(vae.parameters()).device)
        print(f"mean absolute error on held-out pictures: {(x - vae.decode(vae.encode(x))).abs().mean() / 2:.4f} of the range")
        rows = [torch.cat(list(row), dim=2) for row in (x, vae.decode(vae.encode(x)))]
        Image.fromarray(((torch.cat(rows, dim=1) + 1) * 127.5).byte().movedim(0, -1).cpu().numpy()).save(Path(config.out) / "reconstructions.png")
        print(f"wrote {config.out}/reconstructions.png: pictures above, reconstructions below")

    report_errors(demo, STOPPED)
