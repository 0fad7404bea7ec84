"""What things cost. Everything that is compared is timed in alternation in one process, so that what else the machine does falls
on all alike; medians are printed, and ratios of medians.

    python tests/bench.py training      tokens a second on a small and a medium work, beside a bare Llama stack
    python tests/bench.py sizes         on a GPU: tokens a second, MFU and memory of the paper's sizes, by switch
    python tests/bench.py attention     what the hybrid mask costs beside plain causal attention
    python tests/bench.py ranks         tokens a second of torchrun train.py by number of processes
    python tests/bench.py sampling      images and tokens a second, the cache, long prompts, how calls are shared out
    python tests/bench.py data          images a second that a core decodes; tars and a folder of --pairs pairs: indexing, opening again, memory

--peer: training and sampling also against transfusion-pytorch (pip install transfusion-pytorch), at the same width, depth and heads.
--quick: fewer and smaller measurements, to see that all of it runs. Threads are torch's own; OMP_NUM_THREADS sets them.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_model, tiny_trained
from PIL import Image
from torch.nn.attention.flex_attention import flex_attention

from attention_mask import flex_mask, transfusion_mask
from data import NO_LOSS, ImageSegment, Tokenizer, collate
from diffusion import DDPM, guide
from extras import engine, generate
from extras.costs import batch_flops, peak_flops
from extras.machine import machine
from extras.pairs import Pairs, load_image
from extras.parallel import wrap
from model import SIZES, Transfusion, TransfusionConfig, rope_table, rotate
from train import Config, losses


def alternate(functions, repeats, warm_up=1):
    """Call each of {name: function} in turn, `warm_up` times unmeasured and then `repeats` times -> {name: median seconds}."""
    seconds = {name: [] for name in functions}
    for n in range(warm_up + repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if n >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title, header, rows):
    """Print rows of cells under a title, columns aligned to the right, the first to the left."""
    cells = [list(header)] + [[cell if isinstance(cell, str) else f"{cell:,.2f}" if cell < 100 else f"{cell:,.0f}" for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))), flush=True)


# ---- Training -------------------------------------------------------------------------------------------------------


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def training_step(optimizer, compute_loss):
    """A function that takes one step on compute_loss()."""

    def step():
        compute_loss().backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def documents(rows, per_row, text, config, device):
    """A batch of rows of documents: so many tokens of text, then an image -> (Batch, clean latents, t, eps)."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda: torch.randint(256, (text,), generator=generator).tolist()
    nothing = ImageSegment(lambda: torch.zeros(1, 1, 3, dtype=torch.uint8).numpy(), 1000)
    length = per_row * (1 + text + config.n_patches + 2)
    length = -(-length // 128) * 128 if per_row > 1 else length
    batch = collate([[[ids(), nothing] for _ in range(per_row)] for _ in range(rows)], Tokenizer(), length, config.n_patches)
    shape = len(batch.images), config.latent_channels, config.latent_size, config.latent_size
    x_0, eps = torch.randn(2, *shape, generator=generator).to(device)
    return batch.to(device), x_0, torch.randint(1, 1001, (len(x_0),), generator=generator).to(device), eps


def in_precision(run_config, device):
    """What a run with this configuration enters around its model."""
    return torch.autocast(device.type, torch.bfloat16, enabled=machine(run_config, device)[0])


def transfusion_step(model, optimizer, work, run_config, device, mask=transfusion_mask):
    """One training step of ours."""
    _, compiled, _ = machine(run_config, device)
    called, ddpm = wrap(SimpleNamespace(model=model, config=run_config, device=device, ranks=1), False, compiled), DDPM().to(device)
    batch, x_0, t, eps = work

    def loss():
        with in_precision(run_config, device):
            lm, per_image = losses(called, ddpm, batch, x_0, t, eps, mask)
        return lm.sum() / (batch.targets != NO_LOSS).sum() + 5 * per_image.mean()

    return training_step(optimizer, loss)


# ---- Training on a CPU, beside others -------------------------------------------------------------------------------


class BareLlama(torch.nn.Module):
    """The floor: embedding, Llama blocks with the fused causal attention, head, and nothing else."""

    def __init__(self, config):
        super().__init__()
        self.inner = Transfusion(config)
        del self.inner.patches

    def forward(self, tokens):
        m = self.inner
        h = m.embedding(tokens)
        rope = rope_table(torch.arange(tokens.shape[1], device=tokens.device)[None], m.config.dim // m.config.n_heads, m.config.rope_theta)
        for block in m.blocks:
            x = block.attention_norm(h)
            q, k, v = block.attention.qkv(x).unflatten(-1, (3, m.config.n_heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v.float(), is_causal=True)
            h = h + block.attention.out(y.transpose(1, 2).flatten(2))
            h = h + block.mlp(block.mlp_norm(h))
        return m.head(m.norm(h))


WORKS = {  # name: model, documents, tokens of text each
    "small": (dict(dim=256, n_layers=6, n_heads=4, latent_channels=4, latent_size=8), 16, 24),  # 16 patches of 16 numbers
    "medium": (dict(dim=768, n_layers=16, n_heads=12, latent_channels=8, latent_size=32), 4, 32),  # 256 patches of 32 numbers
}


def peer_step(config, count, text):
    """One training step of transfusion-pytorch."""
    from transfusion_pytorch import Transfusion as Peer

    patch_dim = config.patch_size**2 * config.latent_channels
    peer = Peer(num_text_tokens=256, dim_latent=patch_dim, modality_default_shape=(config.n_patches,),
                transformer=dict(dim=config.dim, depth=config.n_layers, heads=config.n_heads, dim_head=config.dim // config.n_heads))  # fmt: skip
    work = [[torch.randint(0, 256, (text,)), torch.randn(config.n_patches, patch_dim)] for _ in range(count)]
    return training_step(adamw(peer), lambda: peer(work)), peer


def training(args):
    """Tokens a second on a CPU, on a small and a medium work, beside a bare Llama stack and a peer."""
    device, fp32, bf16 = torch.device("cpu"), Config(precision="fp32"), Config(precision="bf16")
    print(f"training on {torch.get_num_threads()} threads of a CPU; one step = forward, backward, clipping, AdamW; median of {args.rounds}, in alternation")
    for name in args.only or WORKS:
        size, count, text = WORKS[name]
        config = TransfusionConfig(**size, vocab_size=Tokenizer().vocab_size)
        work = documents(count, 1, text, config, device)
        tokens = work[0].tokens
        contestants, models = {}, {}
        ours, bare = Transfusion(config), BareLlama(config)
        optimizers = adamw(ours), adamw(bare)  # one model and one optimizer for both precisions: two would fill a laptop's memory
        for label, run_config in (("ours, fp32", fp32), ("ours, bf16", bf16)):
            contestants[label], models[label] = transfusion_step(ours, optimizers[0], work, run_config, device), ours
        if args.compile:
            models["ours, bf16, compiled"] = compiled = Transfusion(config)
            contestants["ours, bf16, compiled"] = transfusion_step(compiled, adamw(compiled), work, Config(precision="bf16", compile="on"), device)
        for label, run_config in (("bare Llama, fp32", fp32), ("bare Llama, bf16", bf16)):

            def loss(bare=bare, run_config=run_config):
                with in_precision(run_config, device):
                    return F.cross_entropy(bare(tokens).flatten(0, 1).float(), tokens.flatten())

            contestants[label], models[label] = training_step(optimizers[1], loss), bare
        if args.peer:
            contestants["transfusion-pytorch, fp32"], models["transfusion-pytorch, fp32"] = peer_step(config, count, text)
        seconds = alternate(contestants, args.rounds, warm_up=2)
        print(f"\n{name}: dim {config.dim}, depth {config.n_layers}, heads {config.n_heads}; {count} documents of {text} text tokens + {config.n_patches} patches")
        print(f"{'':28}{'ms':>8}{'tokens/s':>10}{'M params':>10}{'x bare Llama':>14}{'x peer' if args.peer else '':>8}")
        for label, s in seconds.items():
            floor = seconds["bare Llama, bf16" if "bf16" in label else "bare Llama, fp32"]
            peer = f"{seconds['transfusion-pytorch, fp32'] / s:8.2f}" if args.peer else ""
            millions = sum(p.numel() for p in models[label].parameters()) / 1e6
            print(f"{label:28}{1000 * s:8.0f}{count * (text + config.n_patches) / s:10,.0f}{millions:10.1f}{s / floor:14.2f}{peer}", flush=True)
    print("tokens: text and patches, without markers. x bare Llama: times its time. x peer: times its speed (its norms that adapt to each token cost it several times a plain Llama's FLOPs)")


# ---- Training on a GPU ----------------------------------------------------------------------------------------------


def sizes(args):
    """Tokens a second, MFU and memory of the paper's sizes on a GPU; packed rows, text and images about one to one."""
    device = torch.device(args.device)
    peak = peak_flops(device)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}; MFU of {peak / 1e12:.0f} TFLOP/s dense bf16" if peak else "no peak known for this device: no MFU")
    print(f"{'size':>6} {'attention':>10} {'compiled':>9} {'precision':>10} {'checkpointed':>13} | {'ms':>7} {'tokens/s':>10} {'MFU':>6} {'GB':>6}")
    switches = [("flex", "on", "bf16", False), ("sdpa", "on", "bf16", False), ("sdpa", "off", "bf16", False), ("flex", "on", "bf16", True), ("sdpa", "off", "fp32", False)]
    for name in args.only or ["0.16b", "0.37b", "0.76b", "1.4b"]:
        size = SIZES[name] if name in SIZES else dict(dim=64, n_layers=2, n_heads=2, latent_size=8)  # anything else: a tiny one, to try the command
        for attention, compiled, precision, again in switches[: args.switches]:
            if attention == "flex" and device.type == "cpu":
                continue
            config = TransfusionConfig(**size)
            run_config = Config(precision=precision, compile=compiled, checkpoint_activations=again)
            text = max(1, args.seq_len // args.images - config.n_patches - 3)
            torch._dynamo.reset()
            try:
                work = documents(args.rows, args.images, text, config, device)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                model = Transfusion(config).to(device)
                step = transfusion_step(model, adamw(model), work, run_config, device, flex_mask if attention == "flex" else transfusion_mask)
                seconds = alternate({"step": step}, args.rounds, warm_up=3)["step"]
                tokens = work[0].tokens.numel()
                mfu = f"{batch_flops(model, work[0]) / seconds / peak:6.1%}" if peak and precision == "bf16" else f"{'-':>6}"
                memory = f"{torch.cuda.max_memory_allocated() / 1e9:6.1f}" if device.type == "cuda" else f"{'-':>6}"
                print(f"{name:>6} {attention:>10} {compiled:>9} {precision:>10} {str(again):>13} | {1000 * seconds:7.0f} {tokens / seconds:10,.0f} {mfu} {memory}", flush=True)
            except torch.OutOfMemoryError:
                print(f"{name:>6} {attention:>10} {compiled:>9} {precision:>10} {str(again):>13} | out of memory", flush=True)
            step = model = work = None


def attention(args):
    """Forward and backward of attention alone: plain causal against the hybrid mask, of one document and of packed ones."""
    device = torch.device(args.device)
    dtype, length, heads, width = (torch.bfloat16, 4096, 24, 64) if device.type == "cuda" else (torch.float32, 512, 4, 64)
    rows, n_patches = (4, 256) if device.type == "cuda" else (2, 64)
    config = TransfusionConfig(latent_size=2 * round(n_patches**0.5))
    print(f"attention, {rows} rows of {length}, {heads} heads of {width}, {dtype}, forward and backward, on {device}; median of {args.rounds}")
    q, k, v = (torch.randn(rows, heads, length, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    flex = torch.compile(flex_attention)
    contestants = {"causal, SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
    for label, images in (("one document", 1), ("packed", length // 512)):
        text = length // images - n_patches - 3
        batch = documents(rows, images, text, config, device)[0]
        ids = batch.image_id[:, :length].contiguous(), batch.doc_id[:, :length].contiguous()
        dense = transfusion_mask(*ids)
        contestants[f"hybrid mask, {label}, SDPA"] = lambda dense=dense: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
        if device.type == "cuda":
            blocks = flex_mask(*ids)
            contestants[f"hybrid mask, {label}, FlexAttention"] = lambda blocks=blocks: flex(q, k, v, block_mask=blocks)
            contestants[f"making the block mask, {label}"] = lambda ids=ids: flex_mask(*ids)

    def forward_and_backward(make):
        y = make()
        if isinstance(y, torch.Tensor):
            y.sum().backward()
            q.grad = k.grad = v.grad = None

    seconds = alternate({label: lambda make=make: forward_and_backward(make) for label, make in contestants.items()}, args.rounds, warm_up=3)
    for label, s in seconds.items():
        print(f"{label:44}{1000 * s:9.2f} ms{s / seconds['causal, SDPA']:8.2f} x causal")


def ranks(args):
    """train.py under torchrun, the small preset with the same work for every process."""
    print(f"{'processes':>10}{'tokens/s':>12}{'x one':>8}")
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for n in args.ranks:
            out = f"{folder}/{n}"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", str(ROOT / "train.py"), "--config", "small", "--out", out,
                       "--rows", str(8 * n), "--max_steps", "40", "--vae_steps", "2", "--judged", "1", "--log_every", "1", "--eval_documents", "8"]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
            speed = statistics.median(line["tokens_per_s"] for line in lines if "tokens_per_s" in line and line["step"] > 10)
            first = first or speed
            print(f"{n:10}{speed:12,.0f}{speed / first:8.2f}", flush=True)


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


def keep_latents(items, *_):
    """In the place of engine.to_document: nothing is decoded, since the peer decodes nothing either."""
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
        engine.TEXT_CALLS = calls
        counts, ends, originals = {"text": 0, "image": 0}, [], (engine.denoise, engine.Engine.sample_tokens, engine.Engine.finish)

        def counted(kind, function):
            def wrapped(*args, **kwargs):
                counts[kind] += 1
                return function(*args, **kwargs)

            return wrapped

        began = time.perf_counter()
        engine.denoise, engine.Engine.sample_tokens = counted("image", originals[0]), counted("text", originals[1])
        engine.Engine.finish = lambda self, one: (ends.append(time.perf_counter() - began), originals[2](self, one))
        try:
            generate(trained, documents, draw=False, temperature=1.0, max_tokens=60, max_images=2, max_batch=4 if quick else 16, steps=12,
                     sampler="ddim", guidance_scale=3.0)  # fmt: skip
        finally:
            engine.denoise, engine.Engine.sample_tokens, engine.Engine.finish = originals
        finished.setdefault(calls, []).append(statistics.mean(ends))
        made[calls] = counts

    usual, choices = engine.TEXT_CALLS, (1, 4) if quick else (1, 4, 8, 16, 64)
    found = alternate({calls: lambda calls=calls: run(calls) for calls in choices}, 1 if quick else 3)
    engine.TEXT_CALLS = usual
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
    engine.to_document = keep_latents
    print(f"sampling on {device}, {torch.get_num_threads()} threads, random weights: dim 256, depth 6, heads 4, 16 patches of 16 numbers")
    for part in (rates, cache, step_cost, sharing) + ((against_peer,) if args.peer else ()):
        part(args.quick, device)


# ---- Your own data --------------------------------------------------------------------------------------------------


def picture_file(kind, width, height):
    """A smooth random picture as the bytes of a file."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, kind, quality=90)
    return file.getvalue()


def members(numbers):
    """Names and bytes of small captioned pictures, JPEG, WebP and PNG in turn."""
    kinds = [(suffix, picture_file(kind, 96, 72)) for suffix, kind in (("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG"))]
    for n in numbers:
        suffix, content = kinds[n % 3]
        yield from ((f"{n:09d}.{suffix}", content), (f"{n:09d}.txt", f"picture number {n}".encode()))


def resident():
    """Megabytes of memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def per_core(function, calls):
    """Calls a second of processor time, whatever else the machine does."""
    seconds = []
    for _ in range(calls):
        began = time.process_time()
        function()
        seconds.append(time.process_time() - began)
    return 1 / statistics.median(seconds)


def data(args):
    """pictures decoded, and what many pairs cost"""
    files = {f"{kind} {width} x {height}": picture_file(kind, width, height) for kind, width, height in
             (("JPEG", 341, 256), ("JPEG", 2730, 2048), ("WEBP", 341, 256), ("PNG", 341, 256))}  # fmt: skip
    rows = [[name, per_core(lambda content=content: load_image(io.BytesIO(content), 256), args.rounds)] for name, content in files.items()]
    table("Images a second of one core, decoded, cropped and resized to 256 x 256", ["", "images/s"], rows)
    with tempfile.TemporaryDirectory() as place:
        tars, folder, per_tar, rows = Path(place) / "tars", Path(place) / "folder", 10_000, []
        tars.mkdir(), folder.mkdir()
        for start in range(0, args.pairs, per_tar):
            with tarfile.open(tars / f"{start // per_tar:05d}.tar", "w") as tar:
                for name, content in members(range(start, min(start + per_tar, args.pairs))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        for name, content in members(range(min(args.pairs, 20_000))):
            (folder / name).write_bytes(content)
        for path in (tars, folder):
            began, pairs = time.perf_counter(), Pairs(path, 64)
            indexed, again = time.perf_counter(), Pairs(path, 64)
            opened, numbers, memory, speeds = time.perf_counter(), itertools.count(), [resident()], []
            for _ in range(4):
                speeds.append(per_core(lambda: again.pair(next(numbers))[1](), min(len(again), 20_000) // 4))
                memory.append(resident())
            rows.append([f"{path.name}, {len(pairs.table.rows):,} pairs", indexed - began, opened - indexed, statistics.median(speeds), *memory])
    table("Seconds to open; then an epoch, or 20,000 pictures of it: images/s of one core (96 x 72 to 64 x 64), MB in memory after each quarter",
          ["", "first", "again", "images/s", "MB: start", "1/4", "1/2", "3/4", "all"], rows)  # fmt: skip


def main(argv=None):
    """The command line: one subcommand a benchmark."""
    parser = argparse.ArgumentParser(description="Benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (training, sizes, attention, ranks, sampling, data):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--rounds", type=int, default=9, help="measurements that the median is of (but for sampling)")
        if function in (training, sampling):
            command.add_argument("--peer", action="store_true", help="also time transfusion-pytorch")
        if function is sampling:
            command.add_argument("--quick", action="store_true", help="fewer and smaller measurements")
        if function is training:
            command.add_argument("--compile", action="store_true", help="also ours with compiled blocks")
        if function in (sizes, attention):
            command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if function in (training, sizes):
            command.add_argument("--only", nargs="+", help="small, medium" if function is training else "0.16b, 0.37b, ...")
        if function is sizes:
            command.add_argument("--rows", type=int, default=4, help="rows a step")
            command.add_argument("--seq_len", type=int, default=4096, help="positions a row")
            command.add_argument("--images", type=int, default=8, help="images a row")
            command.add_argument("--switches", type=int, default=5, help="so many combinations of switches, the fastest first")
        if function is data:
            command.add_argument("--pairs", type=int, default=2000, help="in tars of 10,000; and in a folder, of which 20,000 at most")
        if function is ranks:
            command.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args(argv)
    try:
        args.function(args)
    except ImportError as error:
        sys.exit(f"error: {error.name} is not installed; pip install transfusion-pytorch")


if __name__ == "__main__":
    main()
