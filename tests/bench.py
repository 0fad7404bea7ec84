"""What things cost. Everything that is compared is timed in alternation in one process, so that what else the machine does falls
on all alike; medians are printed, and ratios of medians.

    python tests/bench.py sampling            images and tokens a second, the cache, long prompts, how calls are shared out
    python tests/bench.py sampling --peer     also against transfusion-pytorch (pip install transfusion-pytorch)

--quick: fewer and smaller measurements, to see that all of it runs. Threads are torch's own; OMP_NUM_THREADS sets them.
"""

import argparse
import os
import statistics
import sys
import time

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import torch.nn.functional as F
from conftest import tiny_model, tiny_trained

import sample
from attention_mask import transfusion_mask
from data import Tokenizer
from diffusion import guide
from sample import generate


def alternate(functions, repeats):
    """Call each of {name: function} in turn, once to warm up and then `repeats` times -> {name: median seconds}."""
    seconds = {name: [] for name in functions}
    for n in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if n:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title, header, rows):
    """Print rows of cells under a title, columns aligned to the right, the first to the left."""
    cells = [list(header)] + [[cell if isinstance(cell, str) else f"{cell:,.2f}" if cell < 100 else f"{cell:,.0f}" for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))), flush=True)


# ---- Sampling -------------------------------------------------------------------------------------------------------

SMALL = dict(dim=256, n_layers=6, n_heads=4, mlp_multiple=64, latent_channels=4, side=8)  # 16 patches of 16 numbers
TEXT_TOKENS = 24


def decoding_model(seq_len, device, **bias):
    """The small work's model with random weights, and latents for pictures. bias: of the logits of special tokens."""
    model = tiny_model(scale=4.0, **SMALL).to(device)
    with torch.no_grad():
        model.embedding.weight[:, 0] = model.patches.encoder.bias[0] = 6.0  # so that column 0 of the head is a bias
        model.head.weight.mul_(0.3)
        for name in ("boi", "eos"):
            model.head.weight[getattr(Tokenizer(), name), 0] = bias.get(name, -9.0)
    trained = tiny_trained(model, seq_len=seq_len)
    trained.ddpm.to(device)
    return trained


def keep_latents(items, trained):
    """In the place of sample.to_document: nothing is decoded, since the peer decodes nothing either."""
    return items


def prompt(n, length=TEXT_TOKENS):
    return ["".join(chr(97 + (7 * n + 3 * i) % 26) for i in range(length))]


def rates(quick, device):
    """Images and tokens a second by batch."""
    trained, steps, tokens = decoding_model(512, device), 30, 64
    rows = []
    for batch in (1, 4) if quick else (1, 16, 64):
        documents = [prompt(n) for n in range(batch)]
        found = alternate({
            "images": lambda: generate(trained, documents, max_tokens=0, steps=steps, sampler="ddim", guidance_scale=3.0),
            "plain": lambda: generate(trained, documents, max_tokens=0, steps=steps, sampler="ddim", guidance_scale=1.0),
            "tokens": lambda: generate(trained, documents, draw=False, max_tokens=tokens, max_images=0, temperature=1.0),
        }, 1 if quick else 5)  # fmt: skip
        rows.append([f"batch {batch}", batch / found["images"], batch / found["plain"], batch * tokens / found["tokens"]])
    table(f"{TEXT_TOKENS}-token prompts, {steps} denoising steps", ["", "images/s, guided", "images/s, unguided", "tokens/s"], rows)


@torch.inference_mode()
def recompute(trained, documents, steps, guidance_scale):
    """Caption -> image without a cache: the whole sequence through the model at every step."""
    model, ddpm, tokenizer, n = trained.model, trained.ddpm, trained.tokenizer, trained.model.config.n_patches

    def predict(prefixes, x, t):
        tokens = torch.tensor([prefix + [tokenizer.pad] * n for prefix in prefixes], device=x.device)
        image_id = torch.full_like(tokens, -1)
        image_id[:, -n:] = torch.arange(len(tokens), device=x.device)[:, None]
        positions = torch.arange(tokens.shape[1], device=x.device).expand_as(tokens)
        return model(tokens, image_id, positions, transfusion_mask(image_id), x, torch.full((len(x),), t, device=x.device))[1]

    prefixes = [[tokenizer.bos, *tokenizer.encode(text), tokenizer.boi] for (text,) in documents]
    empty = [[tokenizer.bos, tokenizer.boi]] * len(documents)
    c = model.config
    x = torch.randn(len(documents), c.latent_channels, c.latent_size, c.latent_size, device=next(model.parameters()).device)
    both = lambda x, t: predict(prefixes, x, t) if guidance_scale == 1.0 else guide(predict(prefixes, x, t), predict(empty, x, t), guidance_scale)
    return ddpm.sample(both, x, steps, "ddim")


def cache(quick, device):
    """With the cache and without."""
    rows, steps = [], 5 if quick else 30
    for length in (64,) if quick else (24, 128, 512):
        trained, documents = decoding_model(1024, device), [prompt(n, length) for n in range(1 if quick else 4)]
        for scale in (1.0, 3.0):
            found = alternate({
                "cached": lambda: generate(trained, documents, max_tokens=0, steps=steps, sampler="ddim", guidance_scale=scale),
                "uncached": lambda: recompute(trained, documents, steps, scale),
            }, 1 if quick else 3)  # fmt: skip
            rows.append([f"{length} tokens, guidance {scale}", found["uncached"], found["cached"], found["uncached"] / found["cached"]])
    table(f"{len(documents)} images, {steps} steps: seconds", ["prompt", "recomputed", "cached", "ratio"], rows)


def step_cost(quick, device):
    """A denoising step by the length of the prompt, beside what attention over such a prefix costs by itself."""
    rows, batch, steps = [], 4, 8
    lengths = (16, 64) if quick else (16, 64, 256, 1024, 4096)
    trained = decoding_model(max(lengths) + 32, device)
    c = trained.model.config

    def step(length, scale):
        times = []
        generate(trained, [prompt(n, length) for n in range(batch)], max_tokens=0, steps=steps, sampler="ddim", guidance_scale=scale,
                 on_step=lambda number, n, x: number or times.append(time.perf_counter()))  # fmt: skip
        return statistics.median(b - a for a, b in zip(times[1:], times[2:]))

    def attention(length):
        q = torch.randn(batch, c.n_heads, c.n_patches, c.dim // c.n_heads, device=device)
        k = torch.randn(batch, c.n_heads, length + 2 + c.n_patches, c.dim // c.n_heads, device=device)
        began = time.perf_counter()
        for _ in range(c.n_layers):
            F.scaled_dot_product_attention(q, k, k)
        return time.perf_counter() - began

    for length in lengths:
        found = {"plain": [], "guided": [], "attention": []}
        for _ in range(2 if quick else 3):
            found["plain"].append(step(length, 1.0))
            found["attention"].append(attention(length))
            found["guided"].append(step(length, 3.0))
        plain, guided, alone = (1000 * statistics.median(found[name]) for name in ("plain", "guided", "attention"))
        rows.append([f"{length} tokens", plain, alone, plain - alone, guided])
    table(f"A denoising step of {batch} images: ms", ["prompt", "step", "attention alone", "the rest", "step, guided"], rows)


def sharing(quick, device):
    """Documents that write and draw as they like, 16 places: how many tokens between two denoising steps?"""
    trained, documents, rows = decoding_model(512, device, boi=0.55, eos=0.3), [[]] * (8 if quick else 48), []
    finished, made = {}, {}

    def run(calls):
        sample.TEXT_CALLS = calls
        counts, ends, originals = {"text": 0, "image": 0}, [], (sample.denoise, sample.Decoder.sample_tokens, sample.Decoder.finish)

        def counted(kind, function):
            def wrapped(*args, **kwargs):
                counts[kind] += 1
                return function(*args, **kwargs)

            return wrapped

        began = time.perf_counter()
        sample.denoise, sample.Decoder.sample_tokens = counted("image", originals[0]), counted("text", originals[1])
        sample.Decoder.finish = lambda self, p: (ends.append(time.perf_counter() - began), originals[2](self, p))
        try:
            generate(trained, documents, draw=False, temperature=1.0, max_tokens=60, max_images=2, max_batch=4 if quick else 16, steps=12,
                     sampler="ddim", guidance_scale=3.0)  # fmt: skip
        finally:
            sample.denoise, sample.Decoder.sample_tokens, sample.Decoder.finish = originals
        finished.setdefault(calls, []).append(statistics.mean(ends))
        made[calls] = counts

    usual, choices = sample.TEXT_CALLS, (1, 4) if quick else (1, 4, 8, 16, 64)
    found = alternate({calls: lambda calls=calls: run(calls) for calls in choices}, 1 if quick else 3)
    sample.TEXT_CALLS = usual
    for calls in choices:
        rows.append([f"{calls}", found[calls], statistics.median(finished[calls][1:]), str(made[calls]["text"]), str(made[calls]["image"])])
    table(f"{len(documents)} free documents; TEXT_CALLS is {usual}", ["tokens a step", "seconds", "mean time to an end", "text calls", "denoising calls"], rows)


def against_peer(quick, device):
    """transfusion-pytorch's sample_many and sample_one: same width, depth, heads, prompts, patches, and denoising evaluations."""
    from loguru import logger
    from transfusion_pytorch import Transfusion as Peer

    logger.remove()
    torch.manual_seed(0)
    peer = Peer(num_text_tokens=256, dim_latent=16, modality_default_shape=(4, 4), modality_num_dim=2, add_pos_emb=True,
                transformer=dict(dim=256, depth=6, dim_head=64, heads=4)).to(device).eval()  # fmt: skip
    trained, rows = decoding_model(512, device), []
    forced = dict(max_length=15, force_modality_at_start=0, cfg_scale=3.0, return_unprocessed_modalities=True)  # ends after the picture
    for batch, points in ((2, 4),) if quick else ((1, 16), (16, 7), (16, 16), (64, 7)):
        evaluations = 2 * (points - 1)  # of its midpoint rule between so many points
        prompts = [torch.tensor(trained.tokenizer.encode(prompt(n)[0]), device=device) for n in range(batch)]
        found = alternate({
            "ours": lambda: generate(trained, [prompt(n) for n in range(batch)], max_tokens=0, steps=evaluations, sampler="ddim", guidance_scale=3.0),
            "many": lambda: peer.sample_many(prompts, modality_steps=points, **forced),
            "one": lambda: peer.sample_one(prompts[0], modality_steps=points, cache_kv=True, **forced),
        }, 1 if quick else 3)  # fmt: skip
        ours, many, one = (n / found[name] for name, n in (("ours", batch), ("many", batch), ("one", 1)))
        rows.append([f"batch {batch}, {evaluations} evaluations", ours, many, one, ours / many, ours / one])
    table("Caption -> image with guidance: images/s", ["", "ours", "sample_many", "sample_one", "ratio to many", "ratio to one"], rows)
    ours, theirs = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (trained.model.blocks, peer.transformer))
    print(f"""
  Its blocks hold {theirs:.1f} M parameters, these {ours:.1f} M: its adaptive norms are projections of the timestep at every token. Beside the denoising
  evaluations it makes one call for the prompts and one for each row's unconditional branch, whose prefix is as long as the prompt (its marker tokens
  are in both); here they are one call each. Its sample_many leaves its image position embedding out, so only its time can be compared.""")


def sampling(args):
    """The sampling benchmarks, one table each."""
    if args.peer:
        import transfusion_pytorch  # noqa: F401  if it is missing, better said now than after minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sample.to_document = keep_latents
    print(f"sampling on {device}, {torch.get_num_threads()} threads, random weights: dim 256, depth 6, heads 4, 16 patches of 16 numbers")
    for part in (rates, cache, step_cost, sharing) + ((against_peer,) if args.peer else ()):
        part(args.quick, device)


def main(argv=None):
    """The command line: one subcommand a benchmark."""
    parser = argparse.ArgumentParser(description="Benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (sampling,):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("--quick", action="store_true", help="fewer and smaller measurements")
        command.add_argument("--peer", action="store_true", help="also time transfusion-pytorch")
        command.set_defaults(function=function)
    args = parser.parse_args(argv)
    try:
        args.function(args)
    except ImportError as error:
        sys.exit(f"error: {error.name} is not installed; pip install transfusion-pytorch")


if __name__ == "__main__":
    main()
