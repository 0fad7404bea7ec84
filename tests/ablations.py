"""The paper's comparisons (sections 4.2 and 4.3, figure 5) at toy scale: train every variant, judge it exactly, print the tables.

    python tests/ablations.py                                every table with three seeds: hours on two CPU cores
    python tests/ablations.py --tables attention --seeds 0
    python tests/ablations.py --steps 30 --judged 8          in minutes: does everything run?

A cell is one variant with one seed, trained and scored by train.py in out/ablations/<variant>-<steps>-<seed>-<recipe>. A finished
cell is not trained again, one that was cut off goes on from its last checkpoint, at most 200 steps ago, and the recipe is a hash of
all options, so that other presets make other cells; what the code does, it cannot see. All rows of a table get the same compute:
--steps is the number of steps of the table's yardstick, and every other row takes as many steps as cost the same training FLOPs.
The autoencoders are trained once, with seed 0, and shared by all cells: no range has their spread in it. One of these at a time.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from extras.runs import load_checkpoint  # noqa: E402
from train import parse, set_up, train_step  # noqa: E402

# ---- What is compared: the words after `python train.py` ------------------------------------------------------------------

PAPER = "--config small --patch_size 2"  # the paper's 2 x 2 linear patches, bidirectional, noise limit 500: the yardstick
TRANSFUSION, CHAMELEON = "--config small --patch_size 4", "--config chameleon"  # a quarter as many patches as codes, as in the paper
SAME_SHAPE = f"{CHAMELEON} --vae_unshuffle 4 --vae_latent_channels 4 --vae_batch 8"  # a VQ-VAE of the VAE's shape, as in the paper
TABLES = {
    "models": {
        "Transfusion, 4 patches": TRANSFUSION,
        "Chameleon, 16 codes": CHAMELEON,
        "Transfusion, 16 patches": PAPER,
        "Chameleon, 64 codes": SAME_SHAPE,
    },
    "attention": {
        "linear, causal": f"{PAPER} --image_attention causal",
        "linear, bidirectional": PAPER,
        "U-Net, causal": f"{PAPER} --patch_encoder unet --image_attention causal",
        "U-Net, bidirectional": f"{PAPER} --patch_encoder unet",
    },
    "patches": {
        "linear, 1x1": "--config small --patch_size 1",
        "linear, 2x2": PAPER,
        "linear, 4x4": TRANSFUSION,
        "linear, 8x8": "--config small --patch_size 8",
        "U-Net, 2x2": f"{PAPER} --patch_encoder unet",
        "U-Net, 4x4": "--config small --patch_size 4 --patch_encoder unet",
        "U-Net, 8x8": "--config small --patch_size 8 --patch_encoder unet",
    },
    "noise": {  # drawn as the preset does, more often high than low, and uniformly, as in the paper
        "t <= 1000": f"{PAPER} --image_first_max_t 1000",
        "t <= 500": PAPER,
        "uniform, t <= 1000": f"{PAPER} --t_draw uniform --image_first_max_t 1000",
        "uniform, t <= 500": f"{PAPER} --t_draw uniform",
    },
}
SIZES = ["--dim 64 --n_layers 3 --n_heads 2", "--dim 96 --n_layers 4 --n_heads 3", "", "--dim 192 --n_layers 8 --n_heads 6"]  # "": the preset's
# Rows that every patch size fills to 95 % or more; and enough captions before their pictures for both to be learned within the steps.
COMMON = "--seq_len 232 --rows 4 --caption_first 0.6 --eval_every 200"


# ---- Cells --------------------------------------------------------------------------------------------------------------


def call(words, log=None):
    """Run one of the project's scripts as a user would, on one thread. Exits, with the end of its output, if it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if log:
        log.write_text(done.stdout)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}\nfailed")


def autoencoder(variant):
    """The part of a variant's words that its autoencoder depends on."""
    words = variant.split()
    return [word for pair in zip(words[::2], words[1::2]) if pair[0] == "--config" or pair[0].startswith("--vae_") for word in pair]


def arguments(variant, out):
    """A variant's words for train.py, with its autoencoder in the place of the options that trained it."""
    words = variant.split()
    kept = [word for pair in zip(words[::2], words[1::2]) if not pair[0].startswith("--vae_") for word in pair]
    return [*kept, *COMMON.split(), "--vae", str(out / name(autoencoder(variant)) / "vae.pt")]


def name(words):
    """Of a folder: --config small --patch_size 2 -> small-patch_size-2."""
    return "-".join(words).replace("--config-", "").replace("--", "")


def recipe(words):
    """A hash of every option of train.py that a result depends on, set by these words or by the preset."""
    config = {key: value for key, value in asdict(parse(words)[0]).items() if key not in ("out", "vae", "seed", "judged")}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:6]


def flops_per_step(variant, out):
    """Training FLOPs of a step of a variant, measured once on the first batches of its own stream and noted in flops.json."""
    notes, words = out / "flops.json", arguments(variant, out)
    known, key = json.loads(notes.read_text()) if notes.exists() else {}, f"{variant} {recipe(words)}"
    if key not in known:
        run = set_up(parse([*words, "--out", str(out / "flops"), "--eval_documents", "1"])[0])
        known[key] = float(np.mean([train_step(run)["flops"] for _ in range(5)]))
        notes.write_text(json.dumps(known, indent=1))
    return known[key]


def folder(variant, yardstick, seed, args):
    """Where a cell lies, and how many steps it takes."""
    steps = round(args.steps * flops_per_step(yardstick, args.out) / flops_per_step(variant, args.out))
    return args.out / f"{name(variant.split())}-{steps}steps-seed{seed}-{recipe(arguments(variant, args.out))}", steps


def train_cell(place, steps, variant, seed, args):
    """Train and score one cell, unless that is done."""
    if not (place / "scores.json").exists():
        words = ["train.py", *arguments(variant, args.out), "--seed", seed, "--max_steps", steps, "--judged", args.judged, "--out", place, "--resume"]
        place.mkdir(parents=True, exist_ok=True)
        call([str(word) for word in words], place / "output.txt")
    elif json.loads((place / "scores.json").read_text())["judged"] != args.judged:
        call(["evaluate.py", str(place), "--judged", str(args.judged), "--json", str(place / "scores.json")])
    result = scores(place)
    print(f"{place.name}: prompts {result['prompts']:.1f}, captions {result['captions']:.1f}, perplexity {result['perplexity']:.3f}", flush=True)


def scores(place):
    """What a finished cell measured: % of prompts and captions right, of held-out combinations and (never_) of pairs of colour and
    shape never seen; perplexity per token of new captions of seen combinations (that held-out ones do not occur is a thing to
    learn, too); training FLOPs; steps."""
    splits = json.loads((place / "scores.json").read_text())["splits"]
    found = {prefix + what: 100 * splits[split][what]["all"] for prefix, split in (("", "held_out"), ("never_", "never_seen")) for what in ("prompts", "captions")}
    steps = [line for line in map(json.loads, (place / "log.jsonl").read_text().splitlines()) if "flops" in line]
    return found | {"perplexity": splits["seen"]["perplexity_per_token"], "steps": steps[-1]["step"],
                    "flops": steps[-1]["step"] * np.mean([line["flops"] for line in steps])}  # fmt: skip


# ---- Tables ---------------------------------------------------------------------------------------------------------------


def spread(values, digits=1):
    """Mean and range, as a table shows them."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def print_table(title, rows, args):
    """rows: {label: (variant, yardstick)}."""
    print(f"\n### {title}: mean (and range) of seeds {', '.join(map(str, args.seeds))}; % of {args.judged} right\n")
    print("| | prompts: held out | never seen | captions: held out | never seen | perplexity | steps | TFLOPs |\n|---|---|---|---|---|---|---|---|")
    for row, cell in rows.items():
        cells = [scores(folder(*cell, seed, args)[0]) for seed in args.seeds]
        column = {key: [cell[key] for cell in cells] for key in cells[0]}
        shares = " | ".join(spread(column[key]) for key in ("prompts", "never_prompts", "captions", "never_captions"))
        print(f"| {row} | {shares} | {spread(column['perplexity'], 3)} | {column['steps'][0]} | {np.mean(column['flops']) / 1e12:.2f} |")


def print_besides(rows, args):
    """Of a table's models: the seconds that a picture takes, measured in alternation, and what their autoencoders allow at best."""
    import torch

    from bench import alternate
    from data import to_pixels
    from extras import generate
    from extras.judge import judge
    from extras.scenes import Scenes
    from extras.sources import Skipped, readable
    from sample import load

    torch.set_num_threads(1)
    captions = [[Scenes(split="held_out").pair(i)[0]] for i in range(16)]
    models = {row: load(folder(*cell, args.seeds[0], args)[0]) for row, cell in rows.items()}
    seconds = alternate({row: lambda model=model: generate(model, captions, max_tokens=0) for row, model in models.items()}, 5, warm_up=1)
    print("\nSampling, 16 pictures at once on one thread: " + ", ".join(f"{row} {1000 * s / len(captions):.0f} ms a picture" for row, s in seconds.items()))
    for row, model in models.items():
        right = {}
        for split in Scenes.SPLITS[1:]:
            scenes = Scenes(split=split, seed=1)
            numbers, pictures = zip(*readable(scenes, itertools.count(), args.judged, Skipped("pictures", 1.0)))
            captions = [scenes.pair(i)[0] for i in numbers]
            with torch.no_grad():
                again = model.vae.decode(model.vae.encode(to_pixels(np.stack(pictures)))).movedim(1, -1)
            right[split] = 100 * np.mean([judge(c, ((pixels + 1) * 127.5).round().byte().numpy(), scenes.grammar)["all"] for c, pixels in zip(captions, again)])
        print(f"{row}'s autoencoder gives back rightly: " + ", ".join(f"{split.replace('_', ' ')} {share:.1f} %" for split, share in right.items()))


def draw_scaling(args, rows):
    """Figure 5 of the paper: each model size is a point, its training FLOPs across, a score upwards."""
    from matplotlib import pyplot as plt

    panels = {"prompts": "prompts right, %", "captions": "captions right, %", "perplexity": "perplexity per token"}
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.2), layout="constrained")
    for (score, label), ax in zip(panels.items(), axes):
        for (model, variants), colour in zip(rows.items(), ("tab:blue", "tab:orange")):
            cells = [[scores(folder(*cell, seed, args)[0]) for seed in args.seeds] for cell in variants]
            flops, values = ([[cell[key] for cell in size] for size in cells] for key in ("flops", score))
            ax.plot(np.mean(flops, axis=1), np.mean(values, axis=1), "o-", color=colour, label=model)
            ax.scatter(np.ravel(flops), np.ravel(values), s=8, color=colour, alpha=0.5)
        ax.set(xscale="log", xlabel="training FLOPs", title=label)
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(args.figure, dpi=110)
    print(f"\nwrote {args.figure}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=[*TABLES, "scaling"], default=[*TABLES, "scaling"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="of the yardstick (default 600)")
    parser.add_argument("--judged", type=int, default=200, help="prompts and captions (default 200)")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, a thread each (default 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "out/ablations")
    parser.add_argument("--figure", type=Path, default=ROOT / "assets/scaling.png")
    args = parser.parse_args(argv)
    if "scaling" in args.tables and not importlib.util.find_spec("matplotlib"):
        raise SystemExit("error: the figure of scaling needs a package that is not installed: pip install matplotlib")
    tables = {table: {row: (variant, PAPER) for row, variant in TABLES[table].items()} for table in args.tables if table in TABLES}
    scaling = {}
    if "scaling" in args.tables:  # each size has a compute of its own, that of its Transfusion; the preset's is the other tables'
        yardsticks = [f"{TRANSFUSION} {size}" if size else PAPER for size in SIZES]
        models = {"Transfusion": TRANSFUSION, "Chameleon": CHAMELEON}
        scaling = {model: [(f"{words} {size}".strip(), yardstick) for size, yardstick in zip(SIZES, yardsticks)] for model, words in models.items()}
        tables["scaling"] = {f"{model}, {size or 'the preset'}": cell for model, cells in scaling.items() for size, cell in zip(SIZES, cells)}
    work = list(dict.fromkeys(cell for table in tables.values() for cell in table.values()))
    for words in dict.fromkeys(tuple(autoencoder(variant)) for cell in work for variant in cell):  # of the yardsticks, too
        path = args.out / name(words) / "vae.pt"
        if not (path.exists() and load_checkpoint(path).get("done")):
            call(["vae.py", *words, "--out", str(path.parent), "--resume"])
    cells = [(*folder(*cell, seed, args), cell[0], seed, args) for seed in args.seeds for cell in work]
    pool = ThreadPoolExecutor(args.jobs)
    try:
        for done in as_completed([pool.submit(train_cell, *cell) for cell in cells]):
            done.result()
    finally:  # of a failure, or Ctrl-C, in one cell: begin no others
        pool.shutdown(cancel_futures=True)
    for table, rows in tables.items():
        print_table(table, rows, args)
    if "models" in tables:
        print_besides(tables["models"], args)
    if scaling:
        draw_scaling(args, scaling)


if __name__ == "__main__":
    main()
