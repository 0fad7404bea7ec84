"""Command lines: dataclasses as options, one table of ranges, and errors as one sentence.

A field is an option, and the comment beside it is its help. A field that is a dataclass is a part: its
fields are options, too.
"""

import argparse
import difflib
import inspect
import math
import os
import re
import sys
import time
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import get_args

import torch

from data import clean_text
from extras.runs import opening

PREFIXES = {"autoencoder": "vae_"}  # part -> what the names of its options begin with
RANGES = {
    "finite": lambda x: -math.inf < x < math.inf,
    "between 0 and 1": lambda x: 0 <= x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "above 0 and at most 1": lambda x: 0 < x <= 1,
    "0 or above": lambda x: 0 <= x < math.inf,
    "0 or above, and below 2^40": lambda x: 0 <= x < 2**40,
    "above 0": lambda x: 0 < x < math.inf,
}
MAY_BE_ZERO = "micro_rows shard min_lr weight_decay lambda_ddpm z_loss merges workers image_first_max_t "
MAY_BE_ZERO += "n_kv_heads mlp_width n_res norm_groups kl_weight perceptual_weight disc_weight disc_start "
MAY_BE_ZERO += "commitment_weight code_temperature"
RULE = dict.fromkeys(MAY_BE_ZERO.split(), "0 or above")  # field -> its range; where it has none: above 0
RULE |= dict.fromkeys(("t_mean", "guidance_scale"), "finite")
RULE |= dict.fromkeys(("caption_first", "drop_caption", "text_fraction", "max_broken"), "between 0 and 1")
RULE |= dict.fromkeys(("ema", "beta1", "beta2"), "at least 0 and below 1")
RULE |= {"code_top_p": "above 0 and at most 1", "seed": "0 or above, and below 2^40"}


def options(cls):
    """The options of a dataclass: {name: (the part that it belongs to, or "", its field)}."""
    found = {f.name: ("", f) for f in fields(cls) if not is_dataclass(f.type)}
    for part in fields(cls):
        if is_dataclass(part.type):
            prefix = PREFIXES.get(part.name, "")
            found |= {prefix + f.name: (part.name, f) for f in fields(part.type)}
    return found


def flat(config, parts=None):
    """The values of an instance by the names of its options; of some parts only, if they are given."""
    values = {"": config, **vars(config)}
    known = {name: at for name, at in options(type(config)).items() if parts is None or at[0] in parts}
    return {name: getattr(values[part], f.name) for name, (part, f) in known.items()}


def nested(cls, values):
    """An instance of a dataclass: its options' values, and defaults for the rest. Raises ValueError."""
    tree, known = asdict(cls()), options(cls)
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"no option is called {name}{nearest(name, known)}")
        part, f = known[name]
        (tree[part] if part else tree)[f.name] = value
    return make(cls, tree)


def make(cls, values, where="", prefix=""):
    """An instance of a dataclass from a dict of any content. Raises ValueError that begins with `where`."""
    try:
        if not isinstance(values, dict):
            raise ValueError(f"holds no {cls.__name__}")
        if odd := values.keys() ^ {f.name for f in fields(cls)}:
            name = min(odd, key=str)
            raise ValueError(f"{cls.__name__} {'has an unknown' if name in values else 'lacks'} {name}")
        return cls(**{f.name: check(f, values[f.name], prefix + f.name) for f in fields(cls)})
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def check(f, value, name):
    """The value of a field. Raises ValueError if it is of another type or out of range."""
    if is_dataclass(f.type):
        return make(f.type, value, prefix=PREFIXES.get(name, ""))
    if choices := get_args(f.type):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        return value
    kinds = {float: (int, float), tuple: (tuple, list)}.get(f.type, f.type)
    if not isinstance(value, kinds) or isinstance(value, bool) != (f.type is bool):
        raise ValueError(f"{name} is {value!r}; it must be of type {f.type.__name__}")
    rule = RULE.get(f.name, "above 0")
    for number in {bool: (), str: (), tuple: value}.get(f.type, (value,)):
        if not isinstance(number, (int, float)) or not RANGES[rule](number):
            raise ValueError(f"{name} is {value}; it must be {rule}")
    return value


def comments(cls):
    """The comment beside each field of a dataclass, or right above it, in the source: {field: comment}."""
    found, above, name = {}, [], None
    for line in inspect.getsource(cls).split("\n    def ")[0].splitlines():
        comment = line.partition("# ")[2]
        if field := re.match(r"    (\w+): ", line):
            name = field[1]
            found[name], above = above, []
        if line.startswith("    # "):
            above.append(comment)
        elif name and comment:
            found[name].append(comment)
    return {name: " ".join(lines) for name, lines in found.items()}


def nearest(name, known):
    """The end of a sentence on a name that is not known: the nearest that is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, and name the option nearest to a mistyped one."""

    def error(self, message):
        raise ValueError(f"{message.removeprefix('argument ')}; --help lists the options")

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            close = nearest(unknown[0].split("=")[0], self._option_string_actions)
            raise ValueError(f"unknown option {unknown[0]}{close or '; --help lists the options'}")
        return found


def boolean(text):
    """Reads --NAME true. Raises ValueError on what is neither true nor false."""
    return ("false", "true").index(text.lower()) == 1


def integers(text):
    """Reads --NAME 1,2,4."""
    return tuple(int(n) for n in text.split(",") if n)


def positive(text):
    """Reads a whole number above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}; it must be at least 1")
    return int(text)


def add_options(parser, cls, hidden=()):
    """Make options of the fields of a dataclass and of its parts, a group each, without those in `hidden`."""
    for part, kind in {"": cls, **{f.name: f.type for f in fields(cls) if is_dataclass(f.type)}}.items():
        group = parser.add_argument_group(part or "run", inspect.getdoc(kind))
        helps = comments(kind)
        for name, (owner, f) in options(cls).items():
            if owner != part or name in hidden:
                continue
            choices = "|".join(get_args(f.type))
            read = {bool: boolean, tuple: integers}.get(f.type, str if choices else f.type)
            more = dict(nargs="?", const=True) if f.type is bool else {}  # --fsdp is --fsdp true
            default = str(f.default).strip("()").replace(" ", "") or "none"
            more["help"] = f"{helps[f.name]} (default {default})".strip().replace("%", "%%")
            group.add_argument(f"--{name}", type=read, metavar=choices or read.__name__.upper(), **more)


def read_options(cls, preset, names, argv, description, suited, hidden=(), check=None, **more):
    """The command line -> (an instance of the dataclass, all that argparse found). Raises ValueError.

    preset: a function of one of `names` -> {option: value}, which go before the defaults. suited(device)
    names the preset where none is given. hidden: options that may not be given. check(config, given options):
    raises ValueError on what cannot go together. more: {option: help} of the script that calls.
    """
    usage = "%(prog)s [--config PRESET] [--OPTION VALUE] ..."
    parser = Parser(description=description, usage=usage, allow_abbrev=False)
    usual = "default: by the machine, small or rich"
    parser.add_argument("--config", help=f"preset: {', '.join(names)} ({usual})")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    for name, text in more.items():
        parser.add_argument(f"--{name}", help=text)
    add_options(parser, cls, hidden)
    args = parser.parse_args(argv)
    args.config = suited(getattr(args, "device", None)) if args.config is None else args.config
    if args.config not in names:
        known = f"the presets are {', '.join(names)}{nearest(args.config, names)}"
        raise ValueError(f"no preset is called {args.config!r}; {known}")
    values = {name: getattr(args, name, None) for name in options(cls)}
    given = {name: value for name, value in values.items() if value not in (None, "")}
    config = nested(cls, {"out": f"out/{args.config}"} | preset(args.config) | given)
    if check:
        check(config, given)
    return config, args


SAMPLING = dict(steps=int, sampler=str, guidance_scale=float, code_temperature=float, code_top_p=float)


def add_sampling(parser):
    """The options of training that say how images are sampled."""
    for name, kind in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, help="as of train.py (default: what the run was given)")


def given_sampling(args):
    """Those of the settings of `generate` that were given."""
    names = [*SAMPLING, "eta", "temperature", "top_k", "top_p", "max_tokens", "max_images"]
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def pick_device(name):
    """The torch device of a --device option; auto = the best. Raises ValueError if there is no such."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(filter(there.get, there)) if name == "auto" else name
    if not there.get(name):
        raise ValueError(f"--device {name}: torch sees none here; it must be auto, cpu, cuda or mps")
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in bfloat16
        torch.backends.cudnn.benchmark = True
    return torch.device(name)


def read_prompts(path):
    """The lines of a text file, without the empty ones. Raises ValueError, naming the file."""
    with opening(path, "UTF-8 text"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    prompts = list(filter(None, map(clean_text, lines)))
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; write one a line")
    return prompts


CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """What others wrote, fit for a terminal: control characters but line ends and tabs are spelt out."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


NO_MEMORY = re.compile("out of memory|allocate memory|calculation overflow|multiplication overflow", re.I)


def report_errors(work, stopped=""):
    """Run `work()`; what a person can mend becomes a sentence and exit code 1; Ctrl-C, `stopped` and 130."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of torchrun's processes here, one speaks for all
    try:
        work()
    except KeyboardInterrupt:
        if first and stopped:
            print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            error = (
                "out of memory; try a smaller --micro_rows, --vae_batch or --max_batch, or a smaller model"
            )
        elif isinstance(error, RuntimeError):
            raise
        if not first:
            time.sleep(5)  # what all processes find wrong, the first says, and torchrun then ends the others
        sys.exit("error: " + " ".join(printable(str(error)).splitlines()))
