"""What a size of the model costs to train: FLOPs, memory, and how much of a GPU's speed is used (MFU).

`python extras/costs.py` prints it for the paper's five sizes.
"""

import torch

# FLOP/s, dense bfloat16, from NVIDIA's data sheets, by a part of the device's name.
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12}
PEAK_FLOPS |= {"H200 NVL": 835e12, "H200": 989e12, "A100": 312e12}


def peak_flops(device):
    """The FLOP/s that MFU is a share of, or None: no figure for this device, or it is a slice (MIG)."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name and "MIG" not in name), None)


def weights_of(*modules, ndim=2):
    """How many weights the matrices (ndim 2) or the convolutions (ndim 4) of these modules have."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.ndim == ndim)


def multiplications(patches):
    """What the ways in and out of patches cost an image: every weight of a matrix, as often as it is used."""
    n = patches.config.n_patches * weights_of(patches.encoder, patches.decoder) + weights_of(patches.timestep)
    return n + (patches.multiplications() if hasattr(patches, "multiplications") else 0)


def training_flops(model, context, images=0.0):
    """FLOPs of a training step per position, forward and backward.

    context: how many positions a position sees, on average; images: how many there are per position.
    A matrix of n weights costs a position n multiplications and n additions forward, and twice that backward
    (a gradient for its input, one for itself): 6n. The embedding is a look-up. Attention compares a query
    with `context` keys and sums as many values, each dim wide: 4 dim context a layer forward, 12 in all.
    """
    c = model.config
    of_images = images * multiplications(model.patches) if model.patches else 0
    return 6 * (weights_of(model.blocks, model.head) + of_images) + 12 * c.n_layers * c.dim * context


def batch_flops(model, batch):
    """Training FLOPs that a batch costs."""
    c, positions = model.config, batch.tokens.numel()
    # A position sees all before it in its document, and itself; a patch also the later ones of its image.
    later = (c.n_patches - 1) / 2 if c.image_attention == "bidirectional" else 0
    context = (batch.positions + 1).float().mean() + (batch.image_id >= 0).float().mean() * later
    return positions * training_flops(model, float(context), len(batch.max_t) / positions)


def training_memory(model, gpus, rows, seq_len, checkpoint_activations=False, compiled=False, encoding=0):
    """Bytes that a GPU needs to train, roughly: {part: bytes}. Several GPUs share the weights (--fsdp).

    Weights, gradients, AdamW's two moments and the averaged weights are float32. Gradients are whole on every
    GPU, for they are cut in the last micro-batch only. Matrix products read bfloat16 copies of the weights:
    one GPU has all but the embedding's; those that share have what is outside the blocks, and two blocks.
    Kept for the backward pass are, per position and block: the residual stream at both norms (float32); both
    norms' outputs, q, k and v before RoPE and, but v, after it, attention's output, gate, up, silu(gate) and
    the product (bfloat16). A compiled block keeps no silu(gate), and attention's sum in the place of the
    second residual. For the head it is the softmax, its gradient and that of the logits (float32).
    encoding: bytes that the VAE needs before; they and the activations are never there together.
    """
    c = model.config
    n, block = (sum(p.numel() for p in part.parameters()) for part in (model, model.blocks[0]))
    copied = n - model.embedding.weight.numel() if gpus == 1 else n - max(0, c.n_layers - 2) * block
    kept = 4 * c.dim
    if not checkpoint_activations:
        kept = 22 * c.dim + 6 * c.mlp_dim if compiled else 24 * c.dim + 8 * c.mlp_dim
    activations = rows * seq_len * (c.n_layers * kept + 3 * 4 * c.vocab_size)
    activations = max(activations, encoding)
    shared = dict(weights=4 * n / gpus, optimiser=8 * n / gpus, average=4 * n / gpus)
    return shared | dict(copies=2 * copied, gradients=4 * n, activations=activations)


def encoding_memory(vae, images, image_size, bf16=True):
    """Bytes that encoding so many images at once takes, at most: in the first level's residual blocks.

    There are a block's input, what is normed, its norm and its SiLU; all but the first two are float32.
    vae: a VAEConfig.
    """
    return (12 if bf16 else 16) * vae.channels * (image_size // vae.unshuffle) ** 2 * images


if __name__ == "__main__":
    import itertools
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from model import SIZES, Transfusion, TransfusionConfig
    from train import PRESETS, Config

    tokens, seq_len = 0.5e12, 4096  # the paper's
    parts = ("weights", "copies", "gradients", "optimiser", "average", "activations")
    head = "".join(f"{part:>13}" for part in (*parts, "total", "compiled", "checkpointed"))
    print(f"  size  GFLOPs/token  days of one H100  GPUs  rows |{head}")
    for (name, size), gpus in itertools.product(SIZES.items(), (1, 8, 64)):
        with torch.device("meta"):  # shapes without storage
            model = Transfusion(TransfusionConfig(**size))
        flops = training_flops(model, context=(seq_len + 1) / 2)
        days = tokens * flops / (0.5 * PEAK_FLOPS["H200"]) / 86400
        rows = PRESETS[name].get("micro_rows", Config.micro_rows)
        switches = {}, dict(compiled=True), dict(checkpoint_activations=True)
        found = [training_memory(model, gpus, rows, seq_len, **switch) for switch in switches]
        cells = [*map(found[0].get, parts), *(sum(each.values()) for each in found)]
        row = f"{name:>6}  {flops / 1e9:12.2f}  {days:16,.0f}  {gpus:4}  {rows:4} |"
        print(row + "".join(f"{cell / 1e9:13.1f}" for cell in cells))
    print("GFLOPs/token: forward and backward, sequences of 4096, plain causal attention.")
    print("Days: of an H100 or H200, for the paper's 0.5T tokens at 50% MFU.")
    print("Then GB per GPU, for the preset's rows of 4096 tokens; weights, optimiser and average are")
    print("shared (--fsdp). copies: of weights, in bfloat16. The last two: with compiled blocks, and with")
    print("--checkpoint_activations.")
    image = encoding_memory(Config().autoencoder, 1, 256) / 1e9
    print(f"Before each step the VAE encodes its images: {image:.2f} GB for each of 256x256 at once.")
