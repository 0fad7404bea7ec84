"""Transfusion on one page (Zhou et al. 2024, arXiv 2408.11039): one transformer, two losses.

`python extras/one_page.py` learns from pictures with captions, "a red plus at the top left". Then
it draws and describes combinations that it was never shown. "Departs": not as in the paper.
"""

import itertools
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

SIDE, PATCH = 12, 4  # pixels a side, of an image and of a patch
N_PATCHES, PATCH_DIM = (SIDE // PATCH) ** 2, 3 * PATCH**2
DIM, N_LAYERS, N_HEADS, MLP_DIM, THETA = 96, 3, 4, 256, 100.0
SEED, STEPS, ROWS, LR, WARMUP = 0, 4500, 32, 3e-3, 50
T, DENOISING_STEPS, GUIDANCE, CAPTION_FIRST = 1000, 50, 3.0, 0.6

# ---- Pictures and captions by formula. Pixels, times 3, stand in for latents (section 4.1).
COLOURS = {"red": (3, -3, -3), "green": (-3, 3, -3), "blue": (-3, -3, 3)}
COLOURS |= {"yellow": (3, 3, -3), "purple": (3, -3, 3), "cyan": (-3, 3, 3)}
SHAPES = {  # is a pixel part of it? (0, 0) is the centre
    "square": lambda x, y: (abs(x) <= 1) & (abs(y) <= 1),
    "triangle": lambda x, y: (abs(x) <= 1) & (abs(y) <= 1) & (x <= y),
    "plus": lambda x, y: abs(x) + abs(y) <= 1,
    "cross": lambda x, y: (abs(x) == abs(y)) & (abs(x) <= 1),
}
ROW, COLUMN = {"top": 1, "middle": 5, "bottom": 9}, {"left": 1, "centre": 5, "right": 9}
PLACES = {f"{row} {column}": (COLUMN[column], ROW[row]) for row in ROW for column in COLUMN}
SHIFTS = list(itertools.product([0, 1], repeat=2))  # no place is exact
SCENES = list(itertools.product(COLOURS, SHAPES, PLACES))
CAPTIONS = [f"a {colour} {shape} at the {place}" for colour, shape, place in SCENES]
HELD_OUT = range(0, len(SCENES), 7)  # every seventh combination is kept from the training
SEEN = [n for n in range(len(SCENES)) if n not in HELD_OUT]


def render(colour, shape, place, shift):
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    inside = SHAPES[shape](x - PLACES[place][0] - shift[0], y - PLACES[place][1] - shift[1])
    return torch.tensor(COLOURS[colour]).view(3, 1, 1) * inside.float()  # (3, SIDE, SIDE)


PICTURES = torch.stack([torch.stack([render(*s, shift) for shift in SHIFTS]) for s in SCENES])

# ---- Tokens and the sequence: an image stands among the words, in <BOI> and <EOI> (section 3).
VOCABULARY = ["<PAD>", "<BOS>", "<EOS>", "<BOI>", "<EOI>", *sorted(set(" ".join(CAPTIONS).split()))]
PAD, BOS, EOS, BOI, EOI = range(5)
TOKENS = [[VOCABULARY.index(word) for word in caption.split()] for caption in CAPTIONS]
TEXT = 0  # the image_id of what is no patch; images count from 1


def training_sequence():
    scene = random.choice(SEEN)
    caption, image = TOKENS[scene], random.choice(PICTURES[scene])[None]  # (1, 3, SIDE, SIDE)
    if random.random() > CAPTION_FIRST:  # departs: 0.8; drawing is learned first
        return [BOS, BOI, image, EOI, *caption, EOS], 500  # its largest t; 4.3 tries this
    if random.random() < 0.1:  # guidance also needs to draw without a caption
        return [BOS, BOI, image, EOI, EOS], T
    return [BOS, *caption, BOI, image, EOI, EOS], T


def lay_out(sequences):
    rows, images = [], [torch.empty(0, 3, SIDE, SIDE)]
    for sequence in sequences:
        row = []  # of each position its token and its image_id
        for item in sequence:
            if torch.is_tensor(item):
                row += [(PAD, len(images))] * N_PATCHES  # the token of a patch is never read
                images.append(item)
            else:
                row.append((item, TEXT))
        rows.append(torch.tensor(row))
    rows = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, S, 2), filled with PAD and TEXT
    return rows[..., 0], rows[..., 1], torch.cat(images)  # (B, S), (B, S), (N, 3, SIDE, SIDE)


# ---- The mask: text is read causally, an image all at once (section 3, figure 4).
def attention_mask(image_id):
    causal = torch.ones(image_id.shape[1], image_id.shape[1]).tril().bool()  # (S, S)
    same_image = (image_id[:, :, None] == image_id[:, None]) & (image_id != TEXT)[:, :, None]
    return (causal | same_image)[:, None]  # (B, 1, S, S)


# ---- The network: Llama's blocks for all, ways in and out for each (section 3, footnotes 4 and 6).
def rotate(x):
    frequencies = THETA ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = (torch.arange(x.shape[-2])[:, None] * frequencies).repeat(1, 2)  # (S, D)
    a, b = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()  # (B, H, S, D), RoPE


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm = nn.RMSNorm(DIM, eps=1e-5)
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.q_norm = nn.RMSNorm(DIM // N_HEADS, eps=1e-5)  # departs, and so does k_norm:
        self.k_norm = nn.RMSNorm(DIM // N_HEADS, eps=1e-5)  # they allow ten times the learning rate
        self.out = nn.Linear(DIM, DIM, bias=False)
        self.mlp_norm = nn.RMSNorm(DIM, eps=1e-5)
        self.gate_up = nn.Linear(DIM, 2 * MLP_DIM, bias=False)
        self.down = nn.Linear(MLP_DIM, DIM, bias=False)

    def forward(self, h, mask):
        qkv = self.qkv(self.attention_norm(h)).unflatten(-1, (3, N_HEADS, -1))  # (B, S, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, S, D)
        q, k = rotate(self.q_norm(q)), rotate(self.k_norm(k))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = h + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(h)).chunk(2, -1)
        return h + self.down(F.silu(gate) * up)  # (B, S, DIM)


class Transfusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), DIM)
        self.timestep = nn.Sequential(nn.Linear(256, DIM), nn.SiLU(), nn.Linear(DIM, PATCH_DIM))
        self.encoder = nn.Linear(PATCH_DIM, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(N_LAYERS))
        self.norm = nn.RMSNorm(DIM, eps=1e-5)
        self.head = nn.Linear(DIM, len(VOCABULARY), bias=False)
        self.decoder = nn.Linear(DIM, PATCH_DIM)

    def forward(self, tokens, image_id, x_t, t):
        angles = t[:, None] * 10000.0 ** -(torch.arange(128) / 128)  # (N, 128)
        time = self.timestep(torch.cat([angles.cos(), angles.sin()], -1))  # (N, PATCH_DIM)
        patches = F.unfold(x_t, PATCH, stride=PATCH).mT + time[:, None]  # (N, P, PATCH_DIM)
        h = self.embedding(tokens)  # (B, S, DIM)
        h[image_id != TEXT] = self.encoder(patches).flatten(0, 1)
        mask = attention_mask(image_id)
        for block in self.blocks:
            h = block(h, mask)
        h = self.norm(h)
        patches = self.decoder(h[image_id != TEXT]).unflatten(0, (-1, N_PATCHES))
        return self.head(h), F.fold(patches.mT, SIDE, PATCH, stride=PATCH)


# ---- Noising: a cosine schedule, one t for all of an image (section 2, equation 2).
f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
alphas_cumprod = torch.cat([torch.ones(1), (1 - betas).cumprod(0)])  # (T + 1,); t = 0 is clean


def alpha_sigma(t):
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    return abar.sqrt().float(), (1 - abar).sqrt().float()


def q_sample(x_0, t, eps):
    alpha, sigma = alpha_sigma(t)
    return alpha * x_0 + sigma * eps


# ---- The joint loss: cross-entropy on text, squared error on images (section 3, equation 4).
def losses(model, tokens, image_id, x_0, t, eps):
    logits, prediction = model(tokens[:, :-1], image_id[:, :-1], q_sample(x_0, t, eps), t)
    targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == EOI, PAD)  # <EOI> is never sampled
    lm = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD)  # PAD: no text follows
    alpha, sigma = alpha_sigma(t)
    v = alpha * eps - sigma * x_0  # departs: eps itself, which is learned far more slowly
    return lm, F.mse_loss(prediction, v)


# ---- Training: AdamW, warm-up, cosine (section 4.1; departs: a rate of 3e-4, and beta2 0.95).
def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.98), weight_decay=0.1, fused=True)
    for step in range(STEPS):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / WARMUP, cosine)
        sequences, max_t = zip(*(training_sequence() for _ in range(ROWS)))
        tokens, image_id, x_0 = lay_out(sequences)
        t = (torch.rand(ROWS) * torch.tensor(max_t)).long() + 1  # (N,): one for each image
        lm, ddpm = losses(model, tokens, image_id, x_0, t, torch.randn_like(x_0))
        optimizer.zero_grad()
        (lm + 5 * ddpm).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} of {STEPS}: text {lm:.3f}, images {ddpm:.3f}", flush=True)


# ---- Decoding: token by token; after <BOI>, an image from noise (section 3, "Inference").
def run(model, sequence, t=0):
    tokens, image_id, images = lay_out([sequence])
    times = torch.zeros(len(images), dtype=torch.long)  # earlier images are clean
    times[-1:] = t
    logits, prediction = model(tokens, image_id, images, times)
    return logits[0, -1], prediction[-1:]  # of the next token (V,), of the last image


def denoise(model, sequence):
    x_t = torch.randn(1, 3, SIDE, SIDE)
    for t, s in itertools.pairwise(torch.linspace(T, 0, DENOISING_STEPS + 1).round().long()):
        _, v = run(model, [*sequence, x_t], t)  # given all that precedes the image
        _, unconditional = run(model, [BOS, BOI, x_t], t)  # given nothing
        v = unconditional + GUIDANCE * (v - unconditional)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        x_0 = alpha_t * x_t - sigma_t * v  # the estimate of the clean image
        beta = 1 - (alpha_t / alpha_s) ** 2
        mean = (alpha_s * beta * x_0 + alpha_t / alpha_s * sigma_s**2 * x_t) / sigma_t**2
        x_t = mean + sigma_s / sigma_t * beta.sqrt() * torch.randn_like(x_t)
    return x_t


@torch.no_grad()
def generate(model, sequence):
    while sequence[-1] != EOS and len(sequence) < 30:
        logits, _ = run(model, sequence)
        logits[[PAD, BOS, EOI]] = -torch.inf
        sequence = [*sequence, int(logits.argmax())]
        if sequence[-1] == BOI:  # the model decides when to draw
            sequence = [*sequence, denoise(model, sequence), EOI]
    return sequence


# ---- What it learned: the combinations that training never showed, counted and on a sheet.
def read(picture):
    distances = (PICTURES - picture.clamp(-3, 3)).square().mean((2, 3, 4)).amin(1)  # (scenes,)
    return int(distances.argmin()) if distances.min() < 0.3 else None  # the nearest, if it is near


if __name__ == "__main__":
    torch.set_num_threads(1)  # tensors so small gain nothing from more
    random.seed(SEED)
    torch.manual_seed(SEED)
    model = Transfusion()
    train(model)
    sheet, right = Image.new("RGB", (960, 1120), "white"), [0, 0]
    for n, scene in enumerate(HELD_OUT):
        for _ in range(4):
            drawn = generate(model, [BOS, *TOKENS[scene]])[-3]  # then come <EOI> and <EOS>
            shown = random.choice(PICTURES[scene])[None]
            written = generate(model, [BOS, BOI, shown, EOI])[4:-1]
            right[0] += read(drawn) == scene
            right[1] += written == TOKENS[scene]
        for row, picture, tokens in (0, drawn, TOKENS[scene]), (4, shown, written):
            x, y = n % 8 * 120, (n // 8 + row) * 140
            pixels = (picture[0] * 42.5 + 127.5).clamp(0, 255).byte().permute(1, 2, 0).flatten()
            image = Image.frombytes("RGB", (SIDE, SIDE), bytes(pixels.tolist()))
            sheet.paste(image.resize((108, 108), Image.Resampling.NEAREST), (x, y))
            caption = " ".join(VOCABULARY[token] for token in tokens).replace(" at", "\nat")
            ImageDraw.Draw(sheet).text((x, y + 108), caption, "black")
    Path("out").mkdir(exist_ok=True)
    sheet.save("out/one_page.png")  # above what it drew, below what it described
    print(f"right, of {4 * n + 4}: {right[0]} drawings, {right[1]} captions; see out/one_page.png")
