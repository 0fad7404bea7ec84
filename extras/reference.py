"""Is a run on track? Its held-out losses beside those of finished runs of the same preset.

    python extras/reference.py small out/small_0 out/small_1 ...

writes what these runs had at each validation to assets/reference.json, and assets/curves.png.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from extras import cli, curves, runs  # noqa: E402

FILE = ROOT / "assets/reference.json"
# These options change what a run costs or shows, not where its losses go.
FREE = "out seed device micro_rows compile attention precision checkpoint_activations fsdp shard ".split()
FREE += "wandb log_every eval_every judged max_broken workers cache".split()
# What a loss too high, or a gap too low, says.
MEANINGS = {
    "val_lm": "captions are not learned",
    "val_ddpm_q2": "images are not learned where they are little noised: look at the VAE's reconstructions",
    "val_ddpm_q3": "images are not learned",
    "val_ddpm_q4": "colours and places are not learned",
    "val_gap_q4": "images ignore their captions",
    "val_text_gap": "captions ignore their images",
}


def settings(config):
    """What a reference is of: {option: value} of a configuration's nested dict, but for FREE ones."""
    found = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= {f"{name}.{field}": v for field, v in value.items() if field not in FREE}
        elif name not in FREE:
            found[name] = value
    return json.loads(json.dumps(found))  # lists for tuples, as a file has them


def references():
    """{preset: {settings, seeds, steps: {step: {figure: [mean, lowest, highest]}}}}; {} if none is kept."""
    return runs.read_json(FILE) if FILE.exists() else {}


def verdict(config, step, found):
    """Where a validation, {figure: value}, stands beside its reference -> list of a text, empty without one.

    A figure is off if it is worse than in every run of the reference by more than their range is wide.
    """
    here = settings(asdict(config))
    for kept in references().values():
        then = kept["steps"].get(str(step))
        if not then or kept["settings"] != here:
            continue
        seeds = f"{len(kept['seeds'])} seeds"
        for name, meaning in MEANINGS.items():
            if name not in then or found.get(name) is None:
                continue
            _, low, high = then[name]
            worse = low - found[name] if "gap" in name else found[name] - high
            if worse > high - low:
                return [f"{name} {found[name]:.3g}, not {low:.3g} to {high:.3g} as in {seeds}: {meaning}"]
        return [f"within the range of {seeds}"]
    return []


def collect(folders):
    """Runs by their folders -> what `references` holds of a preset. Raises ValueError if settings differ."""
    configs = [runs.load_checkpoint(Path(folder) / "checkpoint.pt")["config"] for folder in folders]
    if any(settings(config) != settings(configs[0]) for config in configs):
        raise ValueError(f"{', '.join(folders)}: are not runs of the same settings")
    steps = {}
    for folder in folders:
        with open(Path(folder) / "log.jsonl", encoding="utf-8") as lines:
            for line in filter(lambda line: "val_lm" in line, map(json.loads, lines)):
                figures = steps.setdefault(str(line.pop("step")), {})
                for name, value in line.items():
                    figures.setdefault(name, []).append(value)
    for figures in steps.values():
        for name, values in figures.items():
            figures[name] = [sum(values) / len(values), min(values), max(values)]
    return dict(settings=settings(configs[0]), seeds=[config["seed"] for config in configs], steps=steps)


def draw(kept):
    """What `collect` gives -> PIL image of its curves."""

    def points(name):
        return [(int(step), *figures[name]) for step, figures in kept["steps"].items() if name in figures]

    return curves.draw_panels(curves.panels(points))


def main(preset, *folders):
    """The command line."""
    kept = collect(folders)
    runs.write_json(FILE, references() | {preset: kept})
    draw(kept).save(FILE.with_name("curves.png"))
    print(f"{'step':>6}  " + "  ".join(f"{name.removeprefix('val_'):>22}" for name in MEANINGS))
    for step, figures in kept["steps"].items():
        texts = ["{:.3g} ({:.3g} to {:.3g})".format(*figures[name]) for name in MEANINGS]
        print(f"{step:>6}  " + "  ".join(f"{text:>22}" for text in texts))


if __name__ == "__main__":
    cli.report_errors(lambda: main(*sys.argv[1:]))
