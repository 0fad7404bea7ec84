"""Real pictures: scikit-learn's bundled handwritten digits (1,797 scans of 8x8 pixels), as a folder to train on and as a judge.

    pip install scikit-learn
    python tests/digits.py export out/digits_data
    python train.py --config small --data out/digits_data --out out/digits
    python tests/digits.py judge out/digits

`judge` fits a support vector machine on the real training scans alone, says how well it reads the held-out scans, and
then lets it read 200 digits that the model drew. It also writes a sheet of drawn digits beside real ones.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import write_captions
from extras import generate
from extras.pairs import Pairs
from extras.show import contact_sheet
from sample import load

NAMES = "zero one two three four five six seven eight nine".split()


def export(folder):
    """Write every scan as a PNG with its caption beside it."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("error: this script needs scikit-learn: pip install scikit-learn")
    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    for n, (scan, label) in enumerate(zip(digits.images, digits.target)):
        pixels = Image.fromarray((255 - scan * 255 / 16).astype(np.uint8))  # dark ink on white
        pixels.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{n:04d}.png")
        (folder / f"{n:04d}.txt").write_text(f"a handwritten {NAMES[label]}\n")
    print(f"wrote {n + 1} scans to {folder}")


def features(pixels):
    """uint8 pictures (N, 32, 32, 3) -> the scans' own 8x8 ink values, 0..16."""
    return 16 - np.asarray(pixels, np.float32).mean(-1).reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64) * 16 / 255


def judge(run, number, seed):
    """Have a classifier of real scans read what the model of `run` draws, and compare its captions of held-out scans."""
    from sklearn.svm import SVC

    trained = load(run)
    scans = {}
    for split in ("train", "held_out"):
        pairs = Pairs(trained.extra.data, trained.data.image_size, split)
        scans[split] = [load() for _, load in map(pairs.pair, range(len(pairs)))], [caption for caption, _ in map(pairs.pair, range(len(pairs)))]
    reader = SVC(gamma=0.001, C=10).fit(features(scans["train"][0]), scans["train"][1])
    print(f"the classifier reads {reader.score(features(scans['held_out'][0]), scans['held_out'][1]):.1%} of {len(scans['held_out'][1])} held-out scans right")

    captions = [f"a handwritten {NAMES[n % 10]}" for n in range(number)]
    drawn = [document[-1] for document in generate(trained, [[caption] for caption in captions], range(seed, seed + number), max_tokens=0)]
    print(f"it reads {np.mean(reader.predict(features(drawn)) == np.array(captions)):.1%} of {number} drawn digits as they were asked for")
    written = write_captions(trained, scans["held_out"][0])
    print(f"{np.mean([a == b for a, b in zip(written, scans['held_out'][1])]):.1%} of the captions of the {len(written)} held-out scans are right")
    first = {caption: Image.fromarray(pixels) for pixels, caption in reversed(list(zip(*scans["held_out"])))}
    real = [first[caption] for caption in captions[:10]]
    sheet = contact_sheet(real + drawn[:30], ["real"] * 10 + captions[:30], columns=10, side=80)
    sheet.save(Path(run) / "digits.png")
    print(f"wrote {Path(run) / 'digits.png'}: real scans in the first row, drawn ones below")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("export", "judge"))
    parser.add_argument("folder", type=Path, help="export: where to; judge: a run's folder")
    parser.add_argument("--number", type=int, default=200, help="digits to draw")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    export(args.folder) if args.what == "export" else judge(args.folder, args.number, args.seed)
