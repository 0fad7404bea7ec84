"""The autoencoder that turns images into the latents that are diffused (paper, section 4.1 and appendix A).

A convolutional KL-VAE as in latent diffusion (Esser et al. 2021; Rombach et al. 2022): 256x256x3 to 32x32x8.
Its loss is

    L1 + LPIPS + 0.5 GAN (patch discriminator, from `disc_start` on, with an adaptive weight) + 1e-6 KL

with latent diffusion's reduction, on which those weights depend: L1 and KL are *summed* over the elements of
an image and averaged over the batch. The paper's term on MoCo v2 features is left out: no package has those
weights. It trains in float32, for half precision gives NaNs. Each latent channel is standardised by numbers
that are measured after training and stored with the weights: the diffusion sees mean 0 and variance 1.

`python vae.py --config small` trains one alone and shows reconstructions. `--data PATH --encode FOLDER`
encodes all images once: at 256x256 the encoder costs as much as a small transformer.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from tqdm import tqdm

SAVE_EVERY = 5000  # steps


@dataclass
class VAEConfig:
    """The autoencoder's sizes and its training; the defaults are latent diffusion's f8 with 8 channels."""

    channels: int = 128  # width of the first level
    channel_multiples: tuple = (1, 2, 4, 4)  # per level; each level after the first halves the resolution
    n_res: int = 2  # residual blocks per level (one more in the decoder)
    latent_channels: int = 8
    unshuffle: int = 1  # pixels a side folded into channels before the first convolution: cheap downsampling
    mid_attention: bool = True  # attention between the two blocks at the lowest resolution
    quant_convs: bool = False  # 1x1 convolutions on both sides of the latents, which pretrained ones may have
    norm_groups: int = 0  # groups of every group norm; 0 = 32, fewer where there are fewer channels
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0  # LPIPS, when the package lpips is installed
    disc_weight: float = 0.5  # of the discriminator's loss
    disc_start: int = 50_000  # step from which the discriminator plays; beyond `steps`: never
    steps: int = 1_000_000
    batch: int = 32
    lr: float = 1e-4
    warmup: int = 1000  # steps
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the convolutions, at three times lr
    bf16: bool = False  # convolutions in bfloat16, where the transformer's products are

    def __post_init__(self):
        self.channel_multiples = tuple(int(n) for n in self.channel_multiples)  # JSON has lists
        if self.channels < 4 or not self.channel_multiples or min(self.channel_multiples) < 1:
            found = f"channels is {self.channels} and channel_multiples {self.channel_multiples}"
            raise ValueError(f"{found}; they must be at least 4, and one or more whole numbers above 0")

    @property
    def factor(self):
        """Pixels per latent pixel, a side."""
        return self.unshuffle * 2 ** (len(self.channel_multiples) - 1)

    def norm(self, channels):
        """A group norm. Raises ValueError if norm_groups does not divide the channels."""
        groups = self.norm_groups or min(32, channels // 4)
        if channels % groups:
            raise ValueError(f"norm_groups is {groups}; it must divide the channels, {channels}")
        return nn.GroupNorm(groups, channels, eps=1e-6)


# ---- The network ---------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after a norm and SiLU, beside a skip connection."""

    def __init__(self, in_channels, out_channels, norm):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class MidAttention(nn.Module):
    """Single-head attention over all latent pixels, at the lowest resolution."""

    def __init__(self, channels, norm):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))  # (N, 1, H W, C)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]  # fused kernels want four dimensions
        return x + self.out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Conv2d):
    """Halve the resolution; padded right and below only, as in latent diffusion."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def middle(c, width):
    """The two residual blocks at the lowest resolution, with attention between them."""
    between = [MidAttention(width, c.norm)] if c.mid_attention else []
    return [ResBlock(width, width, c.norm), *between, ResBlock(width, width, c.norm)]


def encoder(c, moments):
    """Images (N, 3, H, W) -> (N, moments * latent_channels, H/f, W/f): mean and log-variance."""
    out = moments * c.latent_channels
    layers = [nn.PixelUnshuffle(c.unshuffle), nn.Conv2d(3 * c.unshuffle**2, c.channels, 3, padding=1)]
    width = c.channels
    for level, multiple in enumerate(c.channel_multiples):
        if level:
            layers.append(Downsample(width))
        for _ in range(c.n_res):
            layers.append(ResBlock(width, c.channels * multiple, c.norm))
            width = c.channels * multiple
    layers += [*middle(c, width), c.norm(width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)]
    if c.quant_convs:
        layers.append(nn.Conv2d(out, out, 1))
    return nn.Sequential(*layers)


def decoder(c):
    """Latents (N, latent_channels, h, w) -> images (N, 3, f h, f w)."""
    width = c.channels * c.channel_multiples[-1]
    layers = [nn.Conv2d(c.latent_channels, c.latent_channels, 1)] if c.quant_convs else []
    layers += [nn.Conv2d(c.latent_channels, width, 3, padding=1), *middle(c, width)]
    for level, multiple in enumerate(reversed(c.channel_multiples)):
        if level:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
        for _ in range(c.n_res + 1):
            layers.append(ResBlock(width, c.channels * multiple, c.norm))
            width = c.channels * multiple
    layers += [c.norm(width), nn.SiLU(), nn.Conv2d(width, 3 * c.unshuffle**2, 3, padding=1)]
    return nn.Sequential(*layers, nn.PixelShuffle(c.unshuffle))


def sample_posterior(mean, log_var, noise):
    """A draw from the Gaussian posterior, differentiable in its parameters (Kingma & Welling 2014)."""
    return mean + (0.5 * log_var).exp() * noise


class VAE(nn.Module):
    """Encoder, decoder and the statistics of the latents."""

    def __init__(self, config, moments=2):
        super().__init__()
        self.config = config
        self.encoder = encoder(config, moments)
        self.decoder = decoder(config)
        self.penalty_weight = config.kl_weight  # of what draw_latents returns second
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        if torch.cuda.is_available():
            self.to(memory_format=torch.channels_last)  # as cuDNN wants it

    def posterior(self, pixels):
        """q(z | x), not standardised: (N, 3, H, W) in -1..1 -> mean and log-variance (N, C, H/f, W/f)."""
        mean, log_var = self.encoder(pixels).float().chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    def to_latents(self, mean, log_var, noise=None):
        """The posterior -> standardised latents: its mean, or a draw if noise of that shape is given."""
        z = mean if noise is None else sample_posterior(mean, log_var, noise)
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    @torch.no_grad()
    def encode(self, pixels, noise=None):
        """Images (N, 3, H, W) in -1..1 -> standardised latents (N, C, H/f, W/f)."""
        return self.to_latents(*self.posterior(pixels), noise)

    @torch.no_grad()
    def decode(self, latents):
        """Standardised latents -> images (N, 3, H, W) in -1..1."""
        z = latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        return self.decoder(z).clamp(-1, 1)

    def draw_latents(self, pixels, generator=None):
        """For training: a draw of the posterior (N, C, h, w), with gradient; its KL from N(0, 1) an image."""
        mean, log_var = self.posterior(pixels)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var)
        return sample_posterior(mean, log_var, noise), kl.sum() / len(mean)

    def progress(self, penalty):
        """What the progress bar says of it."""
        return f"KL {penalty.item():.0f}"

    @torch.no_grad()
    def measure_statistics(self, images, batch):
        """Measure the latents' mean and std on about 2048 of the training's images, `batch` at a time."""
        z = []
        for i in range(max(1, min(2048 // batch, self.config.steps))):
            mean, log_var = self.posterior(images(i * batch, batch).to(self.latent_mean.device))
            # Draws, not means: a channel that carries little is mostly the posterior's own noise.
            z.append(sample_posterior(mean, log_var, torch.randn_like(mean)))
        z = torch.cat(z)
        self.latent_mean.copy_(z.mean((0, 2, 3)))
        self.latent_std.copy_(z.std((0, 2, 3)))


class PatchDiscriminator(nn.Sequential):
    """pix2pix's discriminator (Isola et al. 2017): a logit for every patch of the image."""

    def __init__(self, width=64, n_layers=3):
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [width * min(2**i, 8) for i in range(n_layers + 1)]
        for i, (a, b) in enumerate(zip(widths, widths[1:]), 1):
            stride = 2 if i < n_layers else 1
            conv = nn.Conv2d(a, b, 4, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))


# ---- Training ------------------------------------------------------------------------------------


def reconstruction_loss(pixels, output, config, perceptual=None):
    """L1 (+ LPIPS), summed over an image and averaged over the batch."""
    error = (pixels - output).abs()  # (N, 3, H, W)
    if perceptual is not None:  # (N, 1, 1, 1): it counts at every element, as in latent diffusion
        error = error + config.perceptual_weight * perceptual(pixels, output)
    return error.sum() / len(pixels)


def adaptive_weight(reconstruction, adversarial, last_layer):
    """The factor by which the GAN pulls at the last layer as hard as the reconstruction (VQGAN, eq. 7)."""
    losses = (reconstruction, adversarial)
    by_rec, by_gan = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in losses)
    return (by_rec / (by_gan + 1e-4)).clamp(0, 1e4).detach()


def train_vae(
    vae, images, save, state=None, seed=0, lpips=None, interrupted=None, optimizer=AdamW, autocast=nullcontext
):
    """Train a fresh VAE and measure its latents' statistics -> the VAE in eval mode.

    images(first, n): float32 (n, 3, H, W) in -1..1, images number first..first+n-1 of the training data
    save(checkpoint): writes a dict; state: a saved checkpoint to go on from
    lpips(x, y): LPIPS (N, 1, 1, 1), or None = without
    optimizer: the class of the VAE's; autocast: enters the precision of its convolutions
    interrupted(): asked after every step; if true, the state is saved and KeyboardInterrupt raised
    Raises FloatingPointError if the loss is not finite.
    """
    config, device = vae.config, vae.latent_mean.device
    disc = PatchDiscriminator().to(device)
    with_disc = config.disc_start < config.steps and config.disc_weight > 0
    adam = dict(lr=config.lr, betas=(0.5, 0.95), weight_decay=0.0, fused=True)
    optimizer = optimizer(vae.parameters(), **adam)
    disc_optimizer = AdamW(disc.parameters(), **adam)
    parts = dict(vae=vae, optimizer=optimizer)
    if with_disc:
        parts |= dict(disc=disc, disc_optimizer=disc_optimizer)
    step = state["step"] if state else 0
    for name, part in parts.items() if state else ():
        part.load_state_dict(state[name])

    def save_parts(**more):
        states = {name: part.state_dict() for name, part in parts.items()}
        save({"vae_config": asdict(config), "step": step, **states, **more})

    bar = tqdm(range(step, config.steps), desc="VAE", initial=step, total=config.steps, mininterval=1)
    for _ in bar:
        # Linear warm-up, then a cosine to zero.
        now = config.lr * min((step + 1) / config.warmup, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups + disc_optimizer.param_groups:
            group["lr"] = now
        x = images(step * config.batch, config.batch).to(device, memory_format=torch.contiguous_format)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        with autocast():
            z, penalty = vae.draw_latents(x, generator)
            output = vae.decoder(z).float()
        reconstruction = reconstruction_loss(x, output, config, lpips)
        loss = reconstruction + vae.penalty_weight * penalty
        playing = with_disc and step >= config.disc_start
        if playing:
            adversarial = -disc(output).mean()
            weight = adaptive_weight(reconstruction, adversarial, vae.decoder[-2].weight)
            loss = loss + config.disc_weight * weight * adversarial
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient = nn.utils.clip_grad_norm_(vae.parameters(), 1e4)
        if not math.isfinite(loss.item() + gradient.item()):  # before the weights are touched
            found = f"the VAE's loss is {loss.item():g} and its gradient's norm {gradient.item():g}"
            raise FloatingPointError(f"{found} at step {step}: lower --vae_lr (now {config.lr:g})")
        optimizer.step()
        if playing:
            hinge = F.relu(1 - disc(x)).mean() + F.relu(1 + disc(output.detach())).mean()
            disc_optimizer.zero_grad(set_to_none=True)
            (0.5 * hinge).backward()
            disc_optimizer.step()
        if step % 50 == 0 or step == config.steps - 1:
            bar.set_postfix_str(f"L1 {reconstruction.item() / x[0].numel():.4f}, {vae.progress(penalty)}")
        step += 1
        stop = interrupted and interrupted()
        if stop or step % SAVE_EVERY == 0 or step == config.steps:
            save_parts()
        if stop:
            raise KeyboardInterrupt
    vae.eval().measure_statistics(images, config.batch)
    if not vae.latent_std.isfinite().all():
        raise FloatingPointError(f"the VAE's latents are not finite: lower --vae_lr (now {config.lr:g})")
    save_parts(done=True)
    return vae


if __name__ == "__main__":
    from PIL import Image

    import extras
    from extras import cli, runs
    from train import read_options

    def demo():
        about = "Train the VAE of a preset alone and write reconstructions."
        encode = "FOLDER: write the latents of --data there, for train.py --latents"
        config, args = read_options(description=about, encode=encode)
        device = cli.pick_device(config.device)
        if args.encode:
            return extras.encode(config, device, args.resume, args.encode)
        vae = extras.prepare_vae(config, device, args.resume)
        pairs = extras.open_pairs(config, "held_out")
        x = extras.images_of(pairs, config.data.max_broken)(0, 16).to(vae.latent_mean.device)
        again = vae.decode(vae.encode(x))
        print(f"mean absolute error on held-out images: {(x - again).abs().mean() / 2:.4f} of the range")
        rows = [torch.cat([*images], dim=2) for images in (x, again)]  # (3, H, 16 W) each
        sheet = ((torch.cat(rows, dim=1) + 1) * 127.5).byte().movedim(0, -1).cpu().numpy()
        with runs.written(f"{config.out}/reconstructions.png") as file:
            Image.fromarray(sheet).save(file, "png")
        print(f"wrote {config.out}/reconstructions.png: images above, reconstructions below")

    cli.report_errors(demo, runs.STOPPED)
