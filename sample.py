"""Sampling (paper, section 3, "Inference"): text token by token, images by diffusion, in one sequence.

    python sample.py --prompt "a red circle at the top left"     an image of it
    python sample.py --image picture.png                         its caption
    python sample.py --image picture.png --prompt "make it blue" another image, after both
    python sample.py --prompt "a red circle" --max_images 3      a story: text and images in turn
    python sample.py --prompt "a red circle" --free              the model decides when to draw
    python sample.py                                             the model starts without a prompt

`generate_one` is the whole method, for one document, by recomputing the sequence at every step. `generate`
does the same for many at once with a KV cache (extras/engine.py), and is held to it by a test.

From Python: `generate(load("out/small"), [["a red circle"], [image, "make it blue"], []], seeds=[0, 1, 2])`.
"""

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import extras  # before torch, so that Ctrl-C during its import prints one line
import torch
from PIL import Image

from attention_mask import TEXT, transfusion_mask
from data import DataConfig, Tokenizer, to_pixels
from diffusion import DDPM, DiffusionConfig, SamplingConfig, guide
from extras import Choices, cli, generate, runs, show
from extras.pairs import fit_image, load_image
from extras.text import read_prompt
from model import Transfusion, TransfusionConfig
from vae import VAE


@dataclass
class Trained:
    """A model and all that sampling from it needs."""

    model: Transfusion
    vae: VAE
    ddpm: DDPM
    tokenizer: Tokenizer
    data: DataConfig
    sampling: SamplingConfig
    extra: Choices


def load(path, device="cpu"):
    """Read a checkpoint of train.py (a file, or the run's folder) or an export -> Trained, in eval mode.

    Raises ValueError, naming the file, if it is missing, broken or of other sizes than it says.
    """
    path, state = extras.read_trained(Path(path))
    kinds = dict(model=TransfusionConfig, data=DataConfig, diffusion=DiffusionConfig)
    kinds |= dict(sampling=SamplingConfig, extra=Choices)
    parts = {name: cli.make(kind, state["config"].get(name), path) for name, kind in kinds.items()}
    model = extras.new_model(parts.pop("model"), parts["extra"])
    runs.load_weights(model, state["ema"], path)
    vae = extras.restore_vae(state, path).to(device)
    with runs.opening(path, "a checkpoint of this version"):
        tokenizer = extras.restore_tokenizer(state["tokenizer"])
    ddpm = DDPM(**vars(parts.pop("diffusion"))).to(device)
    return Trained(model.to(device).eval(), vae, ddpm, tokenizer, **parts)


def predict_next(model, sequence, t=0):
    """Run one sequence of token ids and latents (1, C, H, W): the last latent is at t, the others clean.

    -> the logits of the next token (vocab_size,), and the prediction for the last image (1, C, H, W).
    """
    c, device = model.config, model.embedding.weight.device
    tokens, image_id, images = [], [], []
    for item in sequence:
        if torch.is_tensor(item):
            tokens += [0] * c.n_patches  # which nothing reads
            image_id += [len(images)] * c.n_patches
            images.append(item)
        else:
            tokens.append(item)
            image_id.append(TEXT)
    no_image = torch.zeros(0, c.latent_channels, c.latent_size, c.latent_size, device=device)
    x_t = torch.cat([no_image, *images])  # (N, C, H, W), N may be 0
    times = torch.zeros(len(x_t), dtype=torch.long, device=device)  # (N,)
    times[-1:] = t  # without an image there is nothing to set
    tokens = torch.tensor([tokens], device=device)  # (1, S)
    image_id = torch.tensor([image_id], device=device)  # (1, S)
    positions = torch.arange(tokens.shape[1], device=device)[None]  # (1, S)
    mask = transfusion_mask(image_id, causal=c.image_attention == "causal")  # (1, 1, S, S)
    logits, prediction = model(tokens, image_id, positions, mask, x_t, times)
    return logits[0, -1].float(), prediction[-1:].float()


def pick_token(logits, temperature, generator):
    """The first token whose cumulative probability reaches a uniform draw: logits (vocab_size,) -> id."""
    if temperature == 0:
        return int(logits.argmax())
    total = (logits.cpu().double() / temperature).softmax(-1).cumsum(-1)  # (vocab_size,)
    return int(torch.searchsorted(total, (1 - torch.rand((), generator=generator)) * total[-1]))


@torch.inference_mode()
def generate_one(
    trained, document, seed=0, draw=True, temperature=None, max_tokens=256, max_images=1, eta=0.0, **settings
):
    """Continue one document, a list of strings and PIL images -> the document and what follows.

    As `generate` does, but every token and every denoising step runs the whole sequence again.
    settings: steps, sampler, guidance_scale; default: those of the training run.
    """
    model, tokenizer, seq_len = trained.model, trained.tokenizer, trained.data.seq_len
    c, device = model.config, model.embedding.weight.device
    sampling = replace(trained.sampling, **settings)
    if temperature is None:
        temperature = 0.0 if document else 1.0
    generator = torch.Generator().manual_seed(int(seed) % 2**64)
    sequence = [tokenizer.bos]  # token ids, and latents (1, C, H, W)

    def length():
        return sum(c.n_patches if torch.is_tensor(item) else 1 for item in sequence)

    def noise_like(x):
        return torch.randn(x.shape, generator=generator).to(device)

    def predict(x_t, t):
        _, prediction = predict_next(model, [*sequence, x_t], t)  # given all that precedes the image
        if sampling.guidance_scale == 1.0:
            return prediction
        _, unconditional = predict_next(model, [tokenizer.bos, tokenizer.boi, x_t], t)  # given nothing
        return guide(prediction, unconditional, sampling.guidance_scale)

    for segment in document:
        if isinstance(segment, str):
            sequence += tokenizer.encode(read_prompt(segment, tokenizer))
        else:
            pixels = to_pixels(fit_image(segment, trained.data.image_size))  # (3, H, W)
            sequence += [tokenizer.boi, trained.vae.encode(pixels[None].to(device)), tokenizer.eoi]
    prompt_length = len(sequence)
    drawing = bool(draw and document and isinstance(document[-1], str))  # image mode, or else text mode
    if drawing:
        sequence.append(tokenizer.boi)

    while (drawing or max_tokens > 0) and length() <= seq_len:
        if drawing:  # denoise; all that follows sees the clean image
            shape = 1, c.latent_channels, c.latent_size, c.latent_size
            x_T = torch.randn(shape, generator=generator).to(device)
            x_0 = trained.ddpm.sample(predict, x_T, sampling.steps, sampling.sampler, eta, noise_like)
            sequence += [x_0, tokenizer.eoi]  # <EOI> is inserted, never sampled
            drawing = False
            max_images -= 1
            continue
        logits, _ = predict_next(model, sequence)
        logits[[tokenizer.bos, tokenizer.eoi, tokenizer.pad]] = -torch.inf
        if max_images <= 0 or length() + 1 + c.n_patches > seq_len:
            logits[tokenizer.boi] = -torch.inf
        token = pick_token(logits, temperature, generator)
        if token == tokenizer.eos:
            break
        sequence.append(token)
        drawing = token == tokenizer.boi
        max_tokens -= 0 if drawing else 1

    document = list(document)
    for is_image, items in groupby(sequence[prompt_length:], torch.is_tensor):
        if is_image:
            pixels = trained.vae.decode(next(items))[0]  # (3, H, W) in -1..1
            pixels = ((pixels + 1) * 127.5).round().byte().movedim(0, -1)
            document.append(Image.fromarray(pixels.cpu().numpy()))
        elif text := tokenizer.decode(list(items)):  # without <BOI> and <EOI>
            document.append(text)
    return document


def main(argv=None):
    """The command line."""
    parser = cli.Parser(description="Sample from a checkpoint of train.py.", allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", help="checkpoint, run's folder or export (default: the newest under out/)")
    add("--prompt", action="append", default=[], help="what to draw; may be given several times")
    add("--prompts", metavar="FILE", help="a text file with a prompt a line")
    add("--image", help="image to caption (or, with --prompt, what precedes the prompt: an instruction)")
    add("--free", action="store_true", help="let the model decide when to draw, not at once after a prompt")
    add("--num", type=cli.positive, help="samples per prompt (default 4; 1 for captions; 8 without a prompt)")
    add("--seed", type=int, default=0, help="of each prompt's first sample (default 0); the next count on")
    cli.add_sampling(parser)
    add("--eta", type=float, help="noise that ddim adds, 0 to 1 (default 0)")
    add("--temperature", type=float, help="of the text; 0 = greedy (default: 0 after a prompt, else 1)")
    add("--top_k", type=int, help="sample text among the k likeliest tokens; 0 = all")
    add("--top_p", type=float, help="sample text among the likeliest that have this probability")
    add("--max_tokens", type=int, help="at most so much new text per document (default 64)")
    add("--max_images", type=int, help="at most so many new images per document (default 1; 0 for captions)")
    add("--max_batch", type=int, default=64, help="documents in work at a time (default 64)")
    add("--out", default="out/samples", help="folder for the images (default out/samples)")
    add("--export", metavar="FILE", help="write the model as one .safetensors file, and stop")
    add("--half", action="store_true", help="with --export: its matrices in float16")
    add("--gif", action="store_true", help="also write the denoising as film.gif")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    ckpt = args.ckpt or runs.newest_checkpoint()
    if not args.export:
        runs.check_folder(args.out, "--out")
    texts = args.prompt + (cli.read_prompts(args.prompts) if args.prompts else [])
    trained = load(ckpt, cli.pick_device(args.device))
    if args.export:
        extras.room("exports").export(trained, args.export, args.half)  # of extras/exports.py
        return print(f"wrote {args.export}; to use it: --ckpt {args.export}")

    image = [Image.fromarray(load_image(args.image, trained.data.image_size))] if args.image else []
    prompts = [[*image, text] for text in texts] or [image]
    num = (4 if texts else 1 if image else 8) if args.num is None else args.num
    documents = [prompt for prompt in prompts for _ in range(num)]
    seeds = [args.seed + n for _ in prompts for n in range(num)]
    draw_at_once = bool(texts) and not args.free
    engine = extras.engine_of(trained)
    settings = engine.defaults(trained) | dict(top_k=0, top_p=1.0, temperature=0.0 if prompts[0] else 1.0)
    settings |= dict(max_images=0 if image and not texts else 1, max_tokens=64) | cli.given_sampling(args)
    if draw_at_once and settings["max_images"] == 1:
        settings["max_tokens"] = 0
    prefix = " ".join(["0:", *texts, ""]) if len(documents) == 1 else None
    terminal = show.Terminal(engine.count_steps(trained, settings), args.gif, prefix)
    calls = dict(on_text=terminal.on_text, on_step=terminal.on_step, max_batch=args.max_batch)
    results = generate(trained, documents, seeds, draw=draw_at_once, **settings, **calls)
    settings |= {"free": args.free} | ({"image": Path(args.image).name} if args.image else {})
    notes = ", ".join(f"{name} {value}" for name, value in settings.items())
    notes = [f"checkpoint {ckpt}, seed {seed}, {notes}" for seed in seeds]
    show.show(results, documents, Path(args.out), terminal, notes, lambda x: engine.to_image(x, trained))


if __name__ == "__main__":
    cli.report_errors(main)
