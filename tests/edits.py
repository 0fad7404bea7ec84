"""The built-in edits as your own data: PNGs and a file of triples, which train.py --data reads; and the exact judge of a model trained on it.

    python tests/edits.py export out/edits_data
    python train.py --config small_edit --data out/edits_data/edits.jsonl --init_from out/small --out out/edits
    python tests/edits.py judge out/edits

The triples are those that `--config small_edit` trains on, token for token and pixel for pixel (tests/test_interleaved.py).
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import evaluate
from extras.scores import format_scores
from extras.stories import Stories
from sample import load


def export(folder, number=Stories.TRAINED, **options):
    """Write so many edits: N.png and N_after.png, and a line of edits.jsonl. options: of Stories."""
    source = Stories(**options)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "edits.jsonl", "w") as file:
        for n in range(number):
            (before, after), (instruction,) = source.example(n)
            names = f"{n:05d}.png", f"{n:05d}_after.png"
            for scene, name in zip((before, after), names):
                Image.fromarray(scene.render()).save(folder / name)
            file.write(json.dumps({"input": names[0], "instruction": instruction, "output": names[1]}) + "\n")
    print(f"wrote {number:,} edits to {folder / 'edits.jsonl'}")


def judge(run, number, seed):
    """Score a model that was trained on such files as one that was trained on the built-in edits."""
    trained = load(run)
    print(format_scores(evaluate(replace(trained, extra=replace(trained.extra, data="", documents="edits")), number, seed)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("export", "judge"))
    parser.add_argument("folder", type=Path, help="export: where to; judge: a run's folder")
    parser.add_argument("--number", type=int, help="edits to write (default: all of training's) or to judge (default: 200 a split)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    export(args.folder, args.number or Stories.TRAINED) if args.what == "export" else judge(args.folder, args.number or 200, args.seed)
