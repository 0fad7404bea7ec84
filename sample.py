"""Sampling (paper, section 3, "Inference"): text token by token, images by diffusion, in one sequence.

    python sample.py --prompt "a red circle at the top left"     a picture of it
    python sample.py --image picture.png                         its caption
    python sample.py                                             the model starts by itself

The rule for a batch of rows in different modes. A row is in text mode until it samples <BOI>, then in image mode until its
picture is finished, then in text mode again, until it samples <EOS> or has used up its tokens and images. The batch
alternates: all rows in text mode advance together, one token a call, until none is left in it; then all waiting rows are
denoised together; and so on until every row is done. Each row has its own cache slots, position and random generator,
so what it produces does not depend on its neighbours.

A denoising step runs only the image's own patches: what came before is in the KV cache, and inside an image everything
sees everything, so the only mask is the one that hides the unused slots of shorter rows. The guidance branch without a
caption is the sequence <BOS> <BOI> patches, run as further rows of the same call.

From Python: `generate(load("out/small"), [["a red circle at the top left"], [image], []], seeds=[0, 1, 2])`.
"""

import argparse
import difflib
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from attention_mask import transfusion_mask
from data import Picture, Tokenizer, collate, fit_image, length, load_image, restore_tokenizer
from diffusion import DDPM, guide
from model import KVCache, Transfusion, TransfusionConfig
from vae import VAE, VAEConfig, load_checkpoint, read_json, read_safetensors, write_safetensors


@dataclass
class Trained:
    """A model and all that sampling from it needs; `config` is the training run's, as nested dicts."""

    model: Transfusion
    vae: VAE
    ddpm: DDPM
    tokenizer: Tokenizer
    config: dict


def load(path, device="cpu"):
    """Read a checkpoint of train.py (a file, or the run's folder), or a folder of `export` -> Trained, with the averaged weights, in eval mode.

    Raises ValueError, naming the file, if it is missing, broken or of other sizes than it says.
    """
    path = Path(path)
    if (path / "config.json").exists() and not (path / "checkpoint.pt").exists():
        state = read_json(path / "config.json")
        if state.get("model_type") != "transfusion":
            raise ValueError(f"{path}: is a model of type {state.get('model_type')!r}, not one that sample.py --export wrote")
        state |= {"ema": read_safetensors(path / "model.safetensors"), "vae": read_safetensors(path / "vae.safetensors")}
    else:
        path = path / "checkpoint.pt" if path.is_dir() else path
        state = load_checkpoint(path)
    if not isinstance(state, dict) or "ema" not in state:
        raise ValueError(f"{path}: is not a checkpoint of train.py")
    try:
        config = state["config"]
        model, vae, ddpm = Transfusion(TransfusionConfig(**config["model"])), VAE(VAEConfig(**state["vae_config"])), DDPM(**config["diffusion"])
        tokenizer = restore_tokenizer(state["tokenizer"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its configuration is not of this version ({error})") from None
    try:
        model.load_state_dict(state["ema"])
        vae.load_state_dict(state["vae"])
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not have the sizes of its configuration ({str(error).splitlines()[-1].strip()})") from None
    return Trained(model.to(device).eval(), vae.to(device).eval(), ddpm.to(device), tokenizer, config)


def export(trained, folder):
    """Write a model for others, without what only training needs: model.safetensors, vae.safetensors, and config.json with the
    tokenizer and all sizes. `load` reads it back. Raises OSError if it cannot be written, ValueError without the package."""
    config = {"model_type": "transfusion", "config": trained.config, "vae_config": asdict(trained.vae.config), "tokenizer": trained.tokenizer.state()}
    write_safetensors(Path(folder) / "model.safetensors", trained.model.state_dict())
    write_safetensors(Path(folder) / "vae.safetensors", trained.vae.state_dict())
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=1))


# ---- The engine -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One document being written."""

    generator: torch.Generator  # on the CPU, so that a seed gives the same numbers on every device
    temperature: float
    tokens_left: int
    images_left: int
    mode: str = "text"  # "text", "image" (waiting to be denoised) or "done"
    position: int = 0  # of the next token or patch, in the document and in the cache
    document: list = field(default_factory=list)  # ids and latents, in order


@torch.inference_mode()
def generate(trained, documents, seeds=None, *, draw=True, steps=None, sampler=None, eta=0.0, guidance_scale=None, temperature=None,
             top_k=0, max_tokens=256, max_images=1, progress=lambda ts: ts, on_text=lambda row, text: None):  # fmt: skip
    """Continue documents, each a list of strings and PIL images ([] = from nothing) -> list of documents, prompts included.

    seeds: one per document (default 0, 1, ...); a row's output depends on its own seed and prompt only
    draw: a document that ends in text goes on with an image at once; False lets the model decide when to draw
    steps, sampler, guidance_scale: of the denoising; default: as in the training run
    temperature: 0 = greedy; default: 0 after a prompt, 1 from nothing. top_k: 0 = all tokens
    max_tokens, max_images: at most so many new ones per document
    progress: wraps the denoising steps (tqdm fits); on_text(row, piece) is called as text is sampled
    Raises ValueError for an empty prompt, or one too long for the sequences that the model was trained on.
    """
    model, tokenizer, ddpm, config = trained.model, trained.tokenizer, trained.ddpm, trained.config
    steps, sampler = config["steps"] if steps is None else steps, sampler or config["sampler"]
    guidance_scale = config["guidance_scale"] if guidance_scale is None else guidance_scale
    device, n_patches = next(model.parameters()).device, model.config.n_patches
    shape = model.config.latent_channels, model.config.latent_size, model.config.latent_size
    if not documents:
        return []
    seeds = list(range(len(documents))) if seeds is None else list(seeds)

    # Prompts -> rows, padded on the right, through the model in one call.
    prompts = [to_segments(document, trained, draw) for document in documents]
    rows = []
    for document, prompt, seed in zip(documents, prompts, seeds, strict=True):
        temper = (0.0 if document else 1.0) if temperature is None else temperature
        row = Row(torch.Generator().manual_seed(seed), temper, max_tokens, max_images, position=length(prompt, n_patches))
        if prompt and prompt[-1] == [tokenizer.boi]:
            row.mode, row.images_left = "image", max_images - 1
        elif max_tokens <= 0:
            row.mode = "done"
        rows.append(row)
    longest = max(row.position for row in rows)
    limit = config["data"]["seq_len"] - (n_patches + 1 if draw else 0)
    if longest > limit:
        raise ValueError(f"the prompt takes {longest} positions; at most {limit} fit the model's sequences of {config['data']['seq_len']}")
    batch = collate([[prompt] for prompt in prompts], tokenizer, longest, n_patches).to(device)
    capacity = max(longest, 2) + max_tokens + max_images * (n_patches + 2)
    cache = KVCache(model.config, 2 * len(rows), capacity, device)  # rows, then their guidance branches

    def run(h, indices, positions, mask, visible):
        """New positions of some cache rows through the trunk. indices (R,), positions (R, n), visible: slots in use."""
        return model.trunk(h, positions, mask, cache.at(indices, positions, visible))

    x_0 = trained.vae.encode(batch.images) if len(batch.images) else torch.zeros(0, *shape, device=device)
    h, _ = model.embed(batch.tokens, batch.image_id, x_0, torch.zeros(len(x_0), dtype=torch.long, device=device))
    everyone = torch.arange(len(rows), device=device)
    positions = torch.arange(longest, device=device).expand(len(rows), -1)
    h = run(h, everyone, positions, transfusion_mask(batch.image_id, batch.doc_id), longest)
    last = torch.tensor([row.position - 1 for row in rows], device=device)
    logits = model.head(h[everyone, last]).float()  # (rows, vocab): for each row, of what comes next
    start = torch.tensor([[tokenizer.bos, tokenizer.boi]], device=device).expand(len(rows), -1)
    causal = torch.ones(2, 2, dtype=torch.bool, device=device).tril()
    run(model.embedding(start), len(rows) + everyone, torch.arange(2, device=device).expand(len(rows), -1), causal, 2)

    def text_step(active):
        """One token for each of these rows."""
        forward, tokens = [], []
        for i in active:
            row = rows[i]
            token = pick_token(logits[i].cpu(), row, tokenizer, top_k)
            if token == tokenizer.eos:
                row.mode = "done"
                continue
            if token == tokenizer.boi:
                row.mode, row.images_left = "image", row.images_left - 1
            else:
                row.document.append(token)
                row.tokens_left -= 1
                on_text(i, tokenizer.decode([token]))
                if row.tokens_left <= 0:
                    row.mode = "done"
                    continue
            forward.append(i)
            tokens.append([token])
        if forward:
            indices = torch.tensor(forward, device=device)
            positions = torch.tensor([[rows[i].position] for i in forward], device=device)
            visible = int(max(rows[i].position for i in forward)) + 1
            mask = (torch.arange(visible, device=device) <= positions)[:, None, None]
            h = run(model.embedding(torch.tensor(tokens, device=device)), indices, positions, mask, visible)
            logits[indices] = model.head(h[:, 0]).float()
            for i in forward:
                rows[i].position += 1

    def image_step(active):
        """One picture for each of these rows."""
        indices = torch.tensor(active, device=device)
        first = torch.tensor([rows[i].position for i in active], device=device)[:, None]
        noise = lambda _=None: torch.stack([torch.randn(shape, generator=rows[i].generator) for i in active]).to(device)
        guided = guidance_scale != 1.0
        who = torch.cat([indices, len(rows) + indices]) if guided else indices
        begin = torch.cat([first, torch.full_like(first, 2)]) if guided else first
        positions = begin + torch.arange(n_patches, device=device)
        visible = int(begin.max()) + n_patches
        mask = (torch.arange(visible, device=device) < begin + n_patches)[:, None, None]
        mask = None if mask.all() else mask

        def predict(x, t):
            x = torch.cat([x, x]) if guided else x
            h = model.patches.encode(x, torch.full((len(x),), t, device=device))
            prediction = model.patches.decode(run(h, who, positions, mask, visible)).float()
            return guide(*prediction.chunk(2), guidance_scale) if guided else prediction

        x_0 = ddpm.sample(predict, noise(), steps, sampler, eta, noise, progress)
        for i, latents in zip(active, x_0):
            rows[i].document.append(latents)
            rows[i].position += n_patches
            if rows[i].tokens_left <= 0:
                rows[i].mode = "done"
        # What follows sees the finished image, clean (t = 0), and <EOI>.
        going_on = [n for n, i in enumerate(active) if rows[i].mode != "done"]
        if going_on:
            indices, first, x_0 = indices[going_on], first[going_on], x_0[going_on]
            eoi = model.embedding(torch.full((len(indices), 1), tokenizer.eoi, device=device))
            h = torch.cat([model.patches.encode(x_0, torch.zeros(len(x_0), device=device)), eoi], dim=1)
            positions = first + torch.arange(n_patches + 1, device=device)
            visible = int(positions.max()) + 1
            last_seen = torch.cat([positions[:, -2:-1].expand(-1, n_patches), positions[:, -1:]], dim=1)
            mask = torch.arange(visible, device=device) <= last_seen[:, None, :, None]
            logits[indices] = model.head(run(h, indices, positions, mask, visible)[:, -1]).float()
            for n in going_on:
                rows[active[n]].position += 1
                rows[active[n]].mode = "text"

    while any(row.mode != "done" for row in rows):
        while active := [i for i, row in enumerate(rows) if row.mode == "text"]:
            text_step(active)
        if active := [i for i, row in enumerate(rows) if row.mode == "image"]:
            image_step(active)
    return [document + to_document(row.document, trained) for document, row in zip(documents, rows)]


def to_segments(document, trained, draw):
    """A list of strings and PIL images -> the segments of a data.Documents document, pictures as clean conditioning."""
    size, segments = trained.config["data"]["image_size"], []
    for part in document:
        if isinstance(part, str):
            if not part.strip():
                raise ValueError("the prompt is empty; say what to draw, or leave it out to let the model start by itself")
            segments.append(trained.tokenizer.encode(part))
        else:
            pixels = fit_image(part, size)
            segments.append(Picture(lambda pixels=pixels: pixels, 0))
    if draw and document and isinstance(document[-1], str):
        segments.append([trained.tokenizer.boi])
    return segments


def to_document(generated, trained):
    """Ids and latents -> strings and PIL images."""
    document, ids = [], []
    for item in [*generated, None]:
        if isinstance(item, int):
            ids.append(item)
            continue
        if ids:
            document.append(trained.tokenizer.decode(ids))
            ids = []
        if item is not None:
            pixels = trained.vae.decode(item[None])[0]
            document.append(Image.fromarray(((pixels + 1) * 127.5).round().byte().movedim(0, -1).cpu().numpy()))
    return document


def pick_token(logits, row, tokenizer, top_k):
    """Sample the next token of a row from logits (vocab,). <EOI>, <BOS> and padding are never sampled."""
    banned = [tokenizer.bos, tokenizer.eoi, tokenizer.pad] + ([tokenizer.boi] if row.images_left <= 0 else [])
    logits[banned] = -torch.inf
    if row.temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
    return int(torch.multinomial((logits / row.temperature).softmax(-1), 1, generator=row.generator))


# ---- What people see ------------------------------------------------------------------------------------------------


def contact_sheet(images, captions, columns=None, side=128):
    """PIL images in a grid, each with its caption under it -> PIL image."""
    columns = columns or min(len(images), math.ceil(math.sqrt(len(images) * 1.6)))
    font, gap, line = ImageFont.load_default(size=12), 10, 15

    def wrap(caption):
        lines = [""]
        for word in caption.split():
            longer = f"{lines[-1]} {word}".strip()
            lines = lines + [word] if lines[-1] and font.getlength(longer) > side else lines[:-1] + [longer]
        return lines

    texts = [wrap(caption) for caption in captions]
    height = side + 6 + line * max(map(len, texts))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (gap + columns * (side + gap), gap + rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (image, text) in enumerate(zip(images, texts)):
        x, y = gap + n % columns * (side + gap), gap + n // columns * (height + gap)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=(205, 205, 205))
        for k, words in enumerate(text):
            draw.text((x, y + side + 4 + k * line), words, fill=(40, 40, 40), font=font)
    return sheet


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, and which names the option nearest to a mistyped one."""

    def error(self, message):
        sys.exit(f"error: {message.removeprefix('argument ')}; --help lists the options")

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option.lstrip("-") for option in self._option_string_actions]
            close = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), known, n=1, cutoff=0.4)
            sys.exit(f"error: unknown option {unknown[0]}; " + (f"did you mean --{close[0]}?" if close else "--help lists the options"))
        return found


def pick_device(name):
    """The torch device of a --device option; auto = the best there is. Raises ValueError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(name):
        raise ValueError(f"--device {name}: " + ("torch sees none here; use --device auto" if name in available else "it must be auto, cpu, cuda or mps"))
    return torch.device(name)


def newest_checkpoint():
    """The checkpoint under out/ that was written last. Raises ValueError if there is none."""
    found = sorted(Path("out").glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError("no checkpoint under out/; train one first: python train.py --config small")
    return found[-1]


def main(argv=None):
    """The command line."""
    parser = Parser(description="Sample from a checkpoint of train.py.", allow_abbrev=False)
    parser.add_argument("--ckpt", help="checkpoint or a run's folder (default: the newest under out/)")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument("--image", help="picture to caption (or, with --prompt, what precedes the prompt)")
    parser.add_argument("--num", type=int, help="samples per prompt (default 4; 1 for captions)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the preset's)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), help="(default: the preset's)")
    parser.add_argument("--guidance_scale", type=float, help="1 = none (default: the preset's)")
    parser.add_argument("--temperature", type=float, help="of the text; 0 = greedy (default: 0 after a prompt, else 1)")
    parser.add_argument("--top_k", type=int, default=0, help="sample text among the k likeliest tokens; 0 = all")
    parser.add_argument("--max_tokens", type=int, default=64, help="at most so much new text")
    parser.add_argument("--out", default="out/samples", help="folder for the pictures (default out/samples)")
    parser.add_argument("--export", metavar="FOLDER", help="write the model there as safetensors and JSON, and stop; --ckpt FOLDER reads it back")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    ckpt = args.ckpt or newest_checkpoint()
    trained = load(ckpt, pick_device(args.device))
    if args.export:
        export(trained, args.export)
        return print(f"wrote {args.export}: config.json, model.safetensors, vae.safetensors")
    image = [Image.fromarray(load_image(args.image, trained.config["data"]["image_size"]))] if args.image else []
    prompts = [[*image, prompt] for prompt in args.prompt] or [image]
    num = (1 if image and not args.prompt else 4) if args.num is None else args.num
    if num < 1:
        raise ValueError(f"--num is {num}; it must be at least 1")
    documents = [prompt for prompt in prompts for _ in range(num)]
    seeds = [args.seed + n for _ in prompts for n in range(num)]
    drawing = bool(args.prompt)
    results = generate(
        trained, documents, seeds, steps=args.steps, sampler=args.sampler, guidance_scale=args.guidance_scale, temperature=args.temperature,
        top_k=args.top_k, max_tokens=0 if drawing else args.max_tokens, max_images=0 if image and not drawing else 1,
        progress=lambda steps: tqdm(steps, desc="denoise", leave=False),
    )  # fmt: skip
    out, pictures, captions = Path(args.out), [], []
    for n, (document, prompt) in enumerate(zip(results, documents)):
        text = " ".join(part.strip() for part in document if isinstance(part, str)) or "(no text)"
        new = [part for part in document[len(prompt) :] if not isinstance(part, str)]
        print(f"{n}: {text}" + "".join(f"  [{out / f'{n:03d}.png'}]" for _ in new))
        for picture in new:
            out.mkdir(parents=True, exist_ok=True)
            notes = PngInfo()
            notes.add_text("prompt", text)
            notes.add_text("settings", f"checkpoint {ckpt}, seed {seeds[n]}, {vars(args)}")
            picture.save(out / f"{n:03d}.png", pnginfo=notes)
            pictures.append(picture)
            captions.append(text)
    if len(pictures) > 1:
        contact_sheet(pictures, captions).save(out / "sheet.png")
        print(f"all of them: {out / 'sheet.png'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
