"""Benchmarks, as tables. Machines are noisy: what is compared is run in alternation in one process, and medians are printed.

    python tests/bench.py training [--peer] [--only small medium]   tokens/s on the small and the medium work, against a bare Llama stack
    python tests/bench.py sizes [--only 0.16b 0.37b] [--rows N]     a GPU: tokens/s, MFU and memory by size and by switch
    python tests/bench.py attention [--device cuda]                 what the hybrid mask costs beside plain causal attention
    python tests/bench.py ranks [--ranks 1 2 4 8]                   tokens/s of torchrun train.py by number of processes

--peer also times transfusion-pytorch (pip install transfusion-pytorch): the same width, depth, heads, tokens and optimiser.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention.flex_attention import flex_attention  # noqa: E402

from attention_mask import flex_mask, transfusion_mask  # noqa: E402
from data import Picture, Tokenizer, collate  # noqa: E402
from diffusion import DDPM  # noqa: E402
from model import SIZES, Transfusion, TransfusionConfig, rope_table, rotate, training_flops  # noqa: E402
from train import NO_LOSS, Config, autocast, losses, mean_context, peak_flops, wrap  # noqa: E402


def alternate(contestants, rounds, device, warm_up=2):
    """Call each of {name: function} once a round -> {name: median seconds}."""
    seconds = {name: [] for name in contestants}
    for n in range(warm_up + rounds):
        for name, run in contestants.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if n >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def training_step(model, compute_loss):
    """A function that takes one step of AdamW on compute_loss()."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        compute_loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def documents(rows, per_row, text, config, device):
    """A batch of rows of documents: so many tokens of text, then an image -> (Batch, clean latents, t, eps)."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda: torch.randint(256, (text,), generator=generator).tolist()
    nothing = Picture(lambda: torch.zeros(1, 1, 3, dtype=torch.uint8).numpy(), 1000)
    length = per_row * (1 + text + config.n_patches + 2)
    length = -(-length // 128) * 128 if per_row > 1 else length
    batch = collate([[[ids(), nothing] for _ in range(per_row)] for _ in range(rows)], Tokenizer(), length, config.n_patches)
    shape = len(batch.images), config.latent_channels, config.latent_size, config.latent_size
    x_0, eps = torch.randn(2, *shape, generator=generator).to(device)
    return batch.to(device), x_0, torch.randint(1, 1001, (len(x_0),), generator=generator).to(device), eps


def transfusion_step(config, work, run_config, device, mask=transfusion_mask):
    """(one training step of ours, the model)."""
    model = Transfusion(config).to(device)
    called, ddpm = wrap(model, run_config, device), DDPM().to(device)
    batch, x_0, t, eps = work

    def loss():
        with autocast(run_config, device):
            lm, per_image = losses(called, ddpm, batch, x_0, t, eps, mask)
        return lm / (batch.targets != NO_LOSS).sum() + 5 * per_image.mean()

    return training_step(model, loss), model


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
    try:
        from transfusion_pytorch import Transfusion as Peer
    except ImportError:
        sys.exit("error: --peer needs a package that is not installed: pip install transfusion-pytorch")
    patch_dim = config.patch_size**2 * config.latent_channels
    peer = Peer(num_text_tokens=256, dim_latent=patch_dim, modality_default_shape=(config.n_patches,),
                transformer=dict(dim=config.dim, depth=config.n_layers, heads=config.n_heads, dim_head=config.dim // config.n_heads))  # fmt: skip
    work = [[torch.randint(0, 256, (text,)), torch.randn(config.n_patches, patch_dim)] for _ in range(count)]
    return training_step(peer, lambda: peer(work)), peer


def training(args):
    device, fp32, bf16 = torch.device("cpu"), Config(precision="fp32"), Config(precision="bf16")
    print(f"training on {torch.get_num_threads()} threads of a CPU; one step = forward, backward, clipping, AdamW; median of {args.rounds}, in alternation")
    for name in args.only or WORKS:
        size, count, text = WORKS[name]
        config = TransfusionConfig(**size, vocab_size=Tokenizer().vocab_size)
        work = documents(count, 1, text, config, device)
        tokens = work[0].tokens
        contestants, models = {}, {}
        for label, run_config in (("ours, fp32", fp32), ("ours, bf16", bf16), *([("ours, bf16, compiled", Config(precision="bf16", compile="on"))] if args.compile else [])):
            contestants[label], models[label] = transfusion_step(config, work, run_config, device)
        for label, run_config in (("bare Llama, fp32", fp32), ("bare Llama, bf16", bf16)):
            models[label] = bare = BareLlama(config)

            def loss(bare=bare, run_config=run_config):
                with autocast(run_config, device):
                    return F.cross_entropy(bare(tokens).flatten(0, 1).float(), tokens.flatten())

            contestants[label] = training_step(bare, loss)
        if args.peer:
            contestants["transfusion-pytorch, fp32"], models["transfusion-pytorch, fp32"] = peer_step(config, count, text)
        seconds = alternate(contestants, args.rounds, device)
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
    """Packed rows of 4096: text and images about one to one."""
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
                step, model = transfusion_step(config, work, run_config, device, flex_mask if attention == "flex" else transfusion_mask)
                seconds = alternate({"step": step}, args.rounds, device, warm_up=3)["step"]
                tokens = work[0].tokens.numel()
                mfu = f"{tokens / seconds * training_flops(model, mean_context(work[0], config.n_patches)) / peak:6.1%}" if peak else f"{'-':>6}"
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

    seconds = alternate({label: lambda make=make: forward_and_backward(make) for label, make in contestants.items()}, args.rounds, device, warm_up=3)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("training", "sizes", "attention", "ranks"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--compile", action="store_true", help="training: ours compiled, too")
    parser.add_argument("--only", nargs="+", help="training: small, medium; sizes: 0.16b, ...")
    parser.add_argument("--rows", type=int, default=4, help="sizes: rows a step")
    parser.add_argument("--seq_len", type=int, default=4096, help="sizes: positions a row")
    parser.add_argument("--images", type=int, default=8, help="sizes: images a row")
    parser.add_argument("--switches", type=int, default=5, help="sizes: so many combinations of switches, the fastest first")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    {"training": training, "sizes": sizes, "attention": attention, "ranks": ranks}[args.what](args)


if __name__ == "__main__":
    main()
