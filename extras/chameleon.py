"""The paper's baseline, Chameleon (Chameleon Team 2024): images are tokens, too (section 4.2).

A VQ-VAE turns an image into codes, one for each latent pixel. The codes come after the text's tokens in the
vocabulary. They are read causally, and next-token prediction is the only loss.

Exports `VQConfig`, `VQVAE`, `Chameleon`, `Objective`, `CodeEngine` and PRESETS.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from attention_mask import TEXT
from data import NO_LOSS
from extras.engine import Engine, pick_tokens, to_pil
from model import Block, Transfusion
from vae import VAE, VAEConfig

# At the same FLOPs a step as `small`. As in the paper an image is four times as many codes (16) as patches.
CHAMELEON = dict(images="discrete", post_norm=True, z_loss=1e-5, guidance_scale=1.5)
CHAMELEON |= dict(vae_steps=3000, vae_lr=2e-3, vae_optimizer="adamw", vae_bf16=False)
CHAMELEON |= dict(max_steps=1500, lr=6e-3)  # draws more prompts right than 3e-3 and 1.2e-2
CHAMELEON |= dict(seq_len=104, caption_first=0.6)  # drawing is the slow part here
# Twice the downsampling of `small`, for 64 codes an image are learned far more slowly than 16.
CHAMELEON |= dict(vae_unshuffle=8, vae_latent_channels=16, codebook=1024, vae_batch=32)
CHAMELEON |= dict(code_temperature=0.0)  # the likeliest code draws far more prompts right than a random one
PRESETS = {"chameleon": CHAMELEON}


# ---- The VQ-VAE ----------------------------------------------------------------------------------


@dataclass
class VQConfig(VAEConfig):
    """A VAE's sizes and training, and those of the codebook."""

    codebook: int = 16384  # codes
    # Of the commitment loss summed over an image, as L1 is. The 0.25 of VQ-VAE is of means over elements.
    commitment_weight: float = 0.25


class Codebook(nn.Module):
    """K vectors, moved in training towards the latents that are nearest to each (van den Oord et al. 2017).

    A dead one, that hardly any latent is nearest to, is put where some latent is. They all begin dead. One
    that stays dead is put elsewhere 160 steps later.
    """

    DECAY = 0.99
    DEAD = 0.01  # of the latents that each vector would get if all got equally many

    def __init__(self, size, channels):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, channels))
        self.register_buffer("counts", torch.zeros(size))  # nearest latents in a batch, a moving average
        # The same over the last ten batches or so, to be shown: `counts` credit the revived with some.
        self.register_buffer("seen", torch.zeros(size), persistent=False)

    def nearest(self, z):
        """Latents (M, C) -> the numbers of the vectors nearest to them (M,) int64."""
        lengths = self.vectors.square().sum(1)  # |z - v|^2, without |z|^2, is one (M, K) matrix
        return torch.addmm(lengths, z, self.vectors.T, alpha=-2).argmin(1)

    @torch.no_grad()
    def forward(self, z, generator=None):
        """Latents (N, C, h, w) -> the nearest vectors, in the same shape, and their codes (N, h, w) int64.

        In training mode the codebook learns from it; generator: draws which latents revive the dead.
        """
        flat = z.movedim(1, -1).flatten(0, 2)  # (M, C)
        if self.training:
            self.revive(flat, generator)
        codes = self.nearest(flat).view(z[:, 0].shape)
        found = self.look_up(codes)
        if self.training:  # each vector moves towards the mean of its latents
            flat_codes, sums = codes.flatten(), self.vectors * self.counts[:, None]
            sums.lerp_(torch.zeros_like(sums).index_add_(0, flat_codes, flat), 1 - self.DECAY)
            seen = torch.bincount(flat_codes, minlength=len(self.counts)).float()
            self.seen.lerp_(seen, 0.1)
            self.counts.lerp_(seen, 1 - self.DECAY)
            self.vectors.copy_(sums / self.counts[:, None])
        return found, codes

    def look_up(self, codes):
        """(N, h, w) -> (N, C, h, w)."""
        return self.vectors[codes].movedim(-1, 1)

    def revive(self, z, generator=None):
        """Put the dead vectors where latents are."""
        share = len(z) / len(self.counts)
        dead = self.counts < self.DEAD * share
        chosen = torch.randint(len(z), dead.shape, generator=generator, device=z.device)
        self.vectors.copy_(torch.where(dead[:, None], z[chosen], self.vectors))
        self.counts[dead] = 5 * self.DEAD * share  # ln 5 / ln (1 / DECAY) steps to prove themselves


def codebook_usage(counts):
    """How often each code occurs (K,) -> the share that do, and their perplexity."""
    p = counts.double() / counts.sum()
    return float((p > 0).double().mean()), float(torch.special.entr(p).sum().exp())


class VQVAE(VAE):
    """A VAE whose latents are vectors of a codebook."""

    def __init__(self, config):
        super().__init__(config, moments=1)
        self.penalty_weight = config.commitment_weight
        self.codebook = Codebook(config.codebook, config.latent_channels)
        self.register_buffer("usage", torch.zeros(2))  # share of the codes that occur, and their perplexity

    def posterior(self, pixels):
        """A single point, the nearest vector: its log-variance is -inf."""
        nearest, _ = self.codebook(self.encoder(pixels))
        return nearest, torch.full_like(nearest, -torch.inf)

    @torch.no_grad()
    def codes(self, pixels):
        """Images (N, 3, H, W) in -1..1 -> (N, H/f, W/f) int64, each 0..codebook-1."""
        return self.codebook(self.encoder(pixels))[1]

    @torch.no_grad()
    def decode_codes(self, codes):
        """Codes (N, H/f, W/f) -> images (N, 3, H, W) in -1..1."""
        return self.decoder(self.codebook.look_up(codes)).clamp(-1, 1)

    def draw_latents(self, pixels, generator=None):
        """What training needs: the nearest vectors (N, C, h, w), and the commitment loss.

        The gradient of the vectors goes to the encoder's outputs, as if they were these.
        """
        z = self.encoder(pixels).float()
        nearest, _ = self.codebook(z, generator)
        return z + (nearest - z).detach(), (z - nearest).square().sum() / len(z)

    def progress(self, penalty):
        perplexity = codebook_usage(self.codebook.seen)[1]
        return f"commitment {penalty.item():.1f}, code perplexity {perplexity:.0f}"

    @torch.no_grad()
    def measure_statistics(self, images, batch):
        """As of a VAE; and how many codes are used."""
        super().measure_statistics(images, batch)
        n, batches = self.config.codebook, range(max(1, 2048 // batch))
        codes = [self.codes(images(i * batch, batch).to(self.usage.device)).flatten() for i in batches]
        share, perplexity = codebook_usage(torch.cat(codes).bincount(minlength=n))
        self.usage.copy_(torch.tensor([share, perplexity]))
        print(f"of {n:,} codes {share:.1%} are used; perplexity {perplexity:.1f}", flush=True)


# ---- The model and its loss ----------------------------------------------------------------------


class PostNormBlock(Block):
    """Each norm comes before what it norms is added (Swin v2's placement)."""

    def forward(self, h, rope, mask, update=None):
        h = h + self.attention_norm(self.attention(h, rope, mask, update))
        return h + self.mlp_norm(self.mlp(h))


def model_config(config):
    """A TransfusionConfig as Chameleon has it: a position for each latent pixel, read causally."""
    return replace(config, patch_size=1, image_attention="causal")


class Chameleon(Transfusion):
    """The transformer without ways in and out of patches."""

    def __init__(self, config, post_norm=True):
        super().__init__(model_config(config), lambda config: None, PostNormBlock if post_norm else Block)
        if post_norm:  # what is added is as large as the norms' weights: scale these, beside a stream of 1
            nn.init.normal_(self.embedding.weight)
            for block in self.blocks:
                for norm in (block.attention_norm, block.mlp_norm):
                    nn.init.constant_(norm.weight, 1 / math.sqrt(2 * config.n_layers))

    def forward(self, tokens, image_id, positions, mask, x_t=None, t=None):
        """As of a Transfusion, for a batch with codes -> logits (B, S, vocab_size), and x_t as it is."""
        h = self.trunk(self.embedding(tokens).float(), positions, mask)
        return self.head(h), x_t


def fill_codes(batch, codes):
    """Make the images of a Batch tokens. codes: (N, n_patches) int64, ids of the shared vocabulary.

    Each is the target of the position before it, and <EOI> that of the last. An image that only conditions
    (max_t 0) has no loss.
    """
    tokens = batch.tokens.masked_scatter(batch.image_id != TEXT, codes)
    # roll(-1, 1) shows a position its right neighbour. It wraps round, but column 0 is in no image.
    image = torch.maximum(batch.image_id, batch.image_id.roll(-1, 1))  # that the target belongs to or ends
    has_loss = F.pad(batch.max_t, (0, 1))[image] > 0  # text, -1, picks the last entry, the appended 0
    targets = torch.where(has_loss, tokens.roll(-1, 1), batch.targets)
    return replace(batch, tokens=tokens, targets=targets, images=batch.images[:0], max_t=batch.max_t[:0])


class Objective:
    """Next-token prediction for text and codes alike; of the same form as train.Objective."""

    NAMES = ("lm",)

    def __init__(self, config, vae, ddpm, tokenizer, make_mask, device, autocast):
        self.config, self.vae, self.vocab_size, self.make_mask = config, vae, tokenizer.vocab_size, make_mask
        self.device, self.autocast = device, autocast

    def counts(self, batch):
        """How many targets, those codes that are yet to be filled in and their <EOI> included, and images."""
        images = int((batch.max_t > 0).sum())
        return int((batch.targets != NO_LOSS).sum()) + (self.config.model.n_patches + 1) * images, images

    def filled(self, batch):
        """A Batch on the device, its images as codes."""
        batch = batch.to(self.device)
        if not len(batch.images):
            return batch
        return fill_codes(batch, self.vocab_size + self.vae.codes(batch.images))

    def token_losses(self, model, batch, z_loss=0.0):
        """The loss at each position (B, S) of a filled Batch, 0 where there is no target."""
        with self.autocast():
            mask = self.make_mask(batch.image_id, batch.doc_id)
            logits, _ = model(batch.tokens, batch.image_id, batch.positions, mask)
            flat, targets = logits.flatten(0, 1).float(), batch.targets.flatten()
            lm = F.cross_entropy(flat, targets, ignore_index=NO_LOSS, reduction="none").view_as(batch.targets)
            if z_loss:
                lm = lm + z_loss * logits.float().logsumexp(-1).square() * (batch.targets != NO_LOSS)
            return lm

    def loss_sums(self, model, batch, row_numbers, key):
        """The sum of the targets' losses; no image has another one."""
        lm = self.token_losses(model, self.filled(batch), self.config.extra.z_loss).sum()
        return lm, torch.zeros_like(lm)

    def validation_sums(self, model, batch, row_numbers, key):
        """{name: (sum of the losses, how many they are)}, text's and codes'."""
        batch = self.filled(batch)
        lm = self.token_losses(model, batch)
        is_code = batch.targets >= self.vocab_size
        is_text = (batch.targets != NO_LOSS) & (batch.image_id == TEXT) & ~is_code  # <EOI> is neither
        kinds = {"val_lm": is_text, "val_codes": is_code}
        return {name: (lm[some].sum().item(), int(some.sum())) for name, some in kinds.items()}


# ---- Sampling ------------------------------------------------------------------------------------


class CodeEngine(Engine):
    """In image mode a step samples one code, with guidance on the logits: it runs the token before it.

    That is <BOI> at first. After the last, one more call leaves that code's keys and values behind.
    """

    IMAGES = "this model samples the codes of its images one by one, and has no denoising steps"

    @staticmethod
    def defaults(trained):
        extra, guidance = trained.extra, dict(guidance_scale=trained.sampling.guidance_scale)
        return guidance | dict(code_temperature=extra.code_temperature, code_top_p=extra.code_top_p)

    @staticmethod
    def count_steps(trained, settings):
        return trained.model.config.n_patches

    @staticmethod
    def to_image(codes, trained):
        """Codes (n_patches,) -> PIL image."""
        side = trained.model.config.latent_size
        return to_pil(trained.vae.decode_codes(codes.view(1, side, side))[0])

    def prepare_images(self, n_images):
        self.steps = self.n_patches

    def embed_prompts(self, batch):
        if len(batch.images):
            with torch.autocast(self.device.type, enabled=False):
                batch = fill_codes(batch, self.tokenizer.vocab_size + self.trained.vae.codes(batch.images))
        return self.model.embedding(batch.tokens)

    def noise(self, sequences):
        """What images begin with: the commonest code everywhere. Only who watches sees it."""
        return self.trained.vae.codebook.counts.argmax().repeat(len(sequences), self.n_patches)

    def predict(self, sequences, branches):
        """The logits of the next codes (R, codes), guided."""
        rows, starts = self.slots(sequences, self.branches)
        tokens, steps = zip(*((s.token, s.step) for s in sequences for _ in range(self.branches)))
        starts = [start + step - 1 for start, step in zip(starts, steps)]
        h = self.run(self.model.embedding(self.tensor(tokens)[:, None]), rows, starts)
        logits = self.model.head(h[:, 0]).float()[:, self.tokenizer.vocab_size :]
        return self.guided(logits) if self.branches == 2 else logits

    def move(self, sequences, logits):
        u = self.tensor([torch.rand((), generator=s.generator) for s in sequences])
        temperature = torch.full_like(u, self.options.code_temperature)
        codes = pick_tokens(logits, temperature, u, top_p=self.options.code_top_p)
        for sequence, code in zip(sequences, codes.tolist()):
            sequence.x[sequence.step] = code
            sequence.token = self.tokenizer.vocab_size + code
