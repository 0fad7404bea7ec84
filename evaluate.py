"""How good is it? Images drawn, captions written, and the perplexity of text (section 4.2).

    python evaluate.py                        the newest checkpoint under out/
    python evaluate.py out/small --judged 500 --json scores.json
    python evaluate.py out/coco --judged 5000 --inception weights-inception-2015-12-05-6726825d.pth \\
        --clip clip-vit-base-patch32 --text wiki.txt

A metric is a function (images, drawn, written, references) -> {name: number}. The built-in scenes have an
exact judge (extras/judge.py); your own data have CIDEr, FID and CLIP score (extras/metrics.py).
"""

import itertools
import math
from dataclasses import replace
from functools import partial

import extras  # before torch, so that Ctrl-C during its import prints one line
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from attention_mask import transfusion_mask
from data import NO_LOSS, collate
from extras import cli, runs, sources
from extras.scores import format_scores
from extras.text import read_texts
from sample import generate, load


def draw_images(trained, prompts, seed=0, generate=generate):
    """A uint8 image for each prompt: a caption, or a document of strings and PIL images that ends in text."""
    documents = [[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]
    drawn = generate(trained, documents, range(seed, seed + len(documents)), max_tokens=0)
    return [np.array(document[-1]) for document in drawn]


def write_captions(trained, images, generate=generate):
    """Greedy captions of uint8 images."""
    documents = [[Image.fromarray(pixels)] for pixels in images]
    written = generate(trained, documents, temperature=0.0, max_images=0, max_tokens=64)
    return [document[1] if len(document) > 1 else "" for document in written]


@torch.no_grad()
def perplexity(trained, texts):
    """Of texts alone (<BOS> text, each token from those before it) -> (per token, per byte).

    A text longer than the training's rows is cut into pieces of that length, each with a <BOS> of its own.
    Raises ValueError if there is nothing to read.
    """
    model, tokenizer, c = trained.model, trained.tokenizer, trained.model.config
    longest = trained.data.seq_len - 1
    encoded = [tokenizer.encode(text) for text in texts]
    pieces = [ids[i : i + longest] for ids in encoded for i in range(0, len(ids), longest)]
    if not pieces:
        raise ValueError("there is no text to measure the perplexity of")
    length = 1 + max(map(len, pieces))
    batch_size = max(1, 4096 // length)  # the logits of 4096 positions fit into memory
    no_images = model.head.weight.new_zeros(0, c.latent_channels, c.latent_size, c.latent_size)
    no_t = torch.zeros(0, dtype=torch.long, device=no_images.device)
    loss, n_tokens = 0.0, 0
    for i in range(0, len(pieces), batch_size):
        rows = [[[piece]] for piece in pieces[i : i + batch_size]]  # one document a row, one segment in each
        batch = collate(rows, tokenizer, length, n_patches=0).to(no_images.device)
        targets = batch.targets.masked_fill(batch.targets == tokenizer.eos, NO_LOSS)  # that is no text
        mask = transfusion_mask(batch.image_id, batch.doc_id)  # (B, 1, S, S)
        logits, _ = model(batch.tokens, batch.image_id, batch.positions, mask, no_images, no_t)
        logits = logits.flatten(0, 1).float()  # (B S, vocab_size)
        loss += F.cross_entropy(logits, targets.flatten(), ignore_index=NO_LOSS, reduction="sum").item()
        n_tokens += int((targets != NO_LOSS).sum())
    return math.exp(loss / n_tokens), math.exp(loss / sum(len(text.encode()) for text in texts))


def score_split(trained, pairs, judged, seed, metrics, generate):
    """Score a model on `judged` pairs of one split -> {what: number, or {aspect: share}}."""
    sizes = trained.data.seq_len, trained.model.config.n_patches
    candidates = sources.fitting(pairs, judged, trained.tokenizer, *sizes)
    skipped = sources.Skipped("pictures", max_broken=1.0)
    again = itertools.cycle(candidates)  # for a broken image another one comes twice
    numbers, images = zip(*sources.readable(pairs, again, len(candidates), skipped))
    references = [pairs.captions(i) for i in numbers]
    captions = [reference[0] for reference in references]
    written = write_captions(trained, images, generate)
    drawn = draw_images(trained, captions, seed, generate)
    scores = {"n": len(numbers)}
    for metric in metrics:
        scores |= metric(images, drawn, written, references)
    per_token, per_byte = perplexity(trained, captions)
    return scores | {"perplexity_per_token": per_token, "perplexity_per_byte": per_byte}


def evaluate(trained, judged=300, seed=1, splits=None, inception="", clip="", generate=generate, bar=False):
    """Score a model on `judged` images of each split -> nested dict, which `format_scores` prints.

    splits: default: seen, held_out and, of the built-in scenes, never_seen. inception, clip: files of the
    networks that FID and CLIP score need; ValueError if those cannot be used. bar: show a progress bar.
    """
    trained = replace(trained, extra=replace(trained.extra, latents=""))  # images, not latents encoded ahead
    all_splits, metrics, score_stories = extras.measures(trained, inception, clip)
    scores = {"judged": judged, "seed": seed, "splits": {}}
    for split in tqdm(splits or all_splits, desc="evaluate", disable=not bar):
        if score_stories:
            found = {"n": judged, "changes": score_stories(trained, split, judged, seed, generate)}
        else:
            pairs = extras.open_pairs(trained, split, seed)
            found = score_split(trained, pairs, judged, seed, metrics, generate)
        scores["splits"][split] = found
    return scores


def main(argv=None):
    """The command line."""
    parser = cli.Parser(description="Score a checkpoint.", allow_abbrev=False)
    add = parser.add_argument
    add("ckpt", nargs="?", help="checkpoint or a run's folder (default: the newest under out/)")
    add("--judged", type=cli.positive, default=300, help="images per split (default 300)")
    add("--seed", type=int, default=1, help="which images and noise (default 1)")
    cli.add_sampling(parser)
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--text", metavar="FILE", help="also measure the perplexity of this text, .txt or .jsonl")
    add("--inception", metavar="FILE", default="", help="weights of FID's network: also measure FID")
    add("--clip", metavar="FOLDER", default="", help="a CLIP of transformers or open_clip: also its score")
    add("--json", metavar="FILE", help="also write the scores there")
    args = parser.parse_args(argv)
    texts = read_texts(args.text) if args.text else []
    if args.json:
        runs.check_file(args.json, "--json")
    trained = load(args.ckpt or runs.newest_checkpoint(), cli.pick_device(args.device))
    options = dict(inception=args.inception, clip=args.clip, bar=True)
    options["generate"] = partial(generate, **cli.given_sampling(args))
    scores = evaluate(trained, args.judged, args.seed, **options)
    if args.text:
        per_token, per_byte = perplexity(trained, texts)
        scores["text"] = dict(path=args.text, perplexity_per_token=per_token, perplexity_per_byte=per_byte)
    print(format_scores(scores))
    if args.json:
        runs.write_json(args.json, scores)


if __name__ == "__main__":
    cli.report_errors(main)
