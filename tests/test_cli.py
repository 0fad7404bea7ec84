"""extras/cli.py: fields become options, whatever is wrong becomes one sentence."""

import errno
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from conftest import flags, run_here

import extras
from extras import cli
from extras.rehearsal import rehearse
from extras.sources import say
from model import SIZES
from train import DERIVED, PRESETS, Config, parse, read_options


@dataclass
class Part:
    """The part of a test."""

    size: int = 3  # beside, with 100 % and a "#": one # two
    # Above it,
    # in two lines.
    rate: float = 0.5
    silent: tuple = (1, 2)
    long_one: Literal["a", "b"] = (
        "a"  # inside brackets
    )

    def __post_init__(self):
        self.silent = tuple(self.silent)  # not of a field


@dataclass
class Whole:
    """All of it."""

    out: str = ""  # where to
    loud: bool = False
    autoencoder: Part = field(default_factory=Part)


def read(*argv, preset=lambda name: {}, **more):
    return cli.read_options(Whole, preset, ["one", "two"], argv, "A test.", lambda device: "one", **more)


# ---- Dataclasses as options -----------------------------------------------------------------------------------------


def test_help_is_the_comment_beside_a_field():
    found = cli.comments(Part)
    assert list(found) == [f.name for f in fields(Part)]
    assert found["size"] == 'beside, with 100 % and a "#": one # two' and found["rate"] == "Above it, in two lines."
    assert found["silent"] == "" and found["long_one"] == "inside brackets"


def test_help_lists_every_option_by_part(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    parts = [f.name for f in fields(Config) if is_dataclass(f.type)]
    assert all(f"{part}: {' '.join(f.__doc__.split())[:30]}" in printed for part, f in zip(parts, [f.type for f in fields(Config) if f.name in parts]))
    for name, (part, f) in cli.options(Config).items():
        kind = dict((each.name, each.type) for each in fields(Config)).get(part, Config)
        assert (f"--{name} " in printed) == (name not in DERIVED), name
        assert name in DERIVED or cli.comments(kind)[f.name] in printed, name


def test_every_preset_is_named(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*PRESETS, *extras.PRESETS])


def test_an_option_goes_before_the_preset_and_that_before_the_default():
    preset = {"one": dict(vae_size=4, vae_rate=0.25), "two": {}}.get
    config, args = read("--vae_size", "5", preset=preset)
    assert config == Whole(out="out/one", autoencoder=Part(size=5, rate=0.25)) and not args.resume
    assert read("--config", "two", "--resume", "--out", "x/y", preset=preset)[0] == Whole(out="x/y")
    assert read("--config", "two", "--resume")[1].resume
    assert read("--extra_one", "a", extra_one="of the script")[1].extra_one == "a"
    for words, loud in (([], False), (["--loud"], True), (["--loud", "true"], True), (["--loud", "False"], False)):
        assert read(*words)[0].loud is loud
    config = read("--vae_silent", "4,5,6", "--vae_long_one", "b")[0]
    assert config.autoencoder.silent == (4, 5, 6) and config.autoencoder.long_one == "b"
    assert read("--vae_silent", "")[0].autoencoder.silent == ()


@pytest.mark.parametrize("words, sentence", [
    (["--quick", "3"], "unknown option --quick; --help lists the options"), (["--vae_siz=3"], "unknown option --vae_siz=3; did you mean --vae_size?"),
    (["--config", "thre"], "no preset is called 'thre'; the presets are one, two"), (["--config", "tow"], "no preset is called 'tow'; the presets are one, two; did you mean two?"),
    (["--vae_size", "x"], "--vae_size: invalid int value: 'x'; --help lists the options"), (["--vae_silent", "1,x"], "--vae_silent: invalid integers value: '1,x'; --help lists the options"),
    (["--loud", "perhaps"], "--loud: invalid boolean value: 'perhaps'; --help lists the options"), (["--vae_size"], "--vae_size: expected one argument; --help lists the options"),
    (["--vae_long_one", "c"], "vae_long_one is 'c'; it must be one of a, b"), (["--vae_size", "0"], "vae_size is 0; it must be above 0"),
    (["--vae_silent", "1,-2"], "vae_silent is (1, -2); it must be above 0"), (["--hid", "1"], "unknown option --hid; --help lists the options"),
])  # fmt: skip
def test_what_is_wrong_with_an_option_is_one_sentence(words, sentence):
    with pytest.raises(ValueError) as error:
        read(*words)
    assert str(error.value) == sentence


def test_hidden_fields_are_no_options():
    with pytest.raises(ValueError, match="unknown option --vae_size"):
        read("--vae_size", "3", hidden={"vae_size"})
    assert read(hidden={"vae_size"})[0].autoencoder.size == 3


@pytest.mark.parametrize("name", [*PRESETS, *extras.PRESETS])
def test_flat_and_nested_are_each_others_opposites(name):
    config = parse(["--config", name])[0]
    options = cli.flat(config)
    assert cli.nested(Config, options) == config and len(options) == len(cli.options(Config))
    assert set(cli.flat(config, ("model", "data"))) == {name for name, (part, _) in cli.options(Config).items() if part in ("model", "data")}
    with pytest.raises(ValueError, match="no option is called lrr; did you mean lr?"):
        cli.nested(Config, {"lrr": 1.0})


def test_a_script_may_have_options_besides():
    config, args = read_options(["--config", "small", "--encode", "x"], encode="a folder")
    assert args.encode == "x" and config.out == "out/small"


# ---- Ranges ---------------------------------------------------------------------------------------------------------

NUMBERS = [name for name, (_, f) in cli.options(Config).items() if f.type in (int, float, tuple)]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in DERIVED])
def test_every_number_is_accepted_or_refused_in_one_sentence(name, value, monkeypatch):
    """Nothing but a ValueError on one line comes of it; what is accepted is finite, and below 0 only where that means something."""
    monkeypatch.setattr(cli, "comments", lambda cls: defaultdict(str))  # which take longest
    try:
        config = parse(["--config", "small", f"--{name}={value}"])[0]
    except ValueError as error:
        assert "\n" not in str(error) and name in str(error)
        if "has no effect" in str(error):
            return
        assert value.lstrip("-")[:3] in str(error)
        assert (f"{name} is" in str(error) and "must be" in str(error)) or f"--{name}: invalid" in str(error)
        assert value != "0" or "above 0" in str(error)
        return
    found = cli.flat(config)[name]
    assert math.isfinite(found) and (found == 0 or name in ("t_mean", "guidance_scale"))


@pytest.mark.parametrize("name, value", [
    ("caption_first", 1.0), ("text_fraction", 1.0), ("max_broken", 1.0), ("code_top_p", 1.0), ("ema", 0.0), ("disc_start", 0), ("t_mean", -2.0), ("guidance_scale", -1.0),
    ("n_res", 0), ("image_first_max_t", 0),
])  # fmt: skip
def test_the_ends_of_a_range_belong_to_it(name, value):
    name = {"disc_start": "vae_disc_start", "n_res": "vae_n_res"}.get(name, name)
    assert cli.flat(cli.nested(Config, {name: value}))[name] == value


@pytest.mark.parametrize("name, value, rule", [
    ("caption_first", 1.01, "between 0 and 1"), ("drop_caption", -0.1, "between 0 and 1"), ("beta2", 1.0, "at least 0 and below 1"), ("code_top_p", 0.0, "above 0 and at most 1"),
    ("guidance_scale", math.nan, "finite"), ("lr", math.inf, "above 0"), ("workers", -1, "0 or above"), ("vae_warmup", 0, "above 0"), ("timesteps", -3, "above 0"),
    ("seed", 2**40, "0 or above, and below 2.40"),
])  # fmt: skip
def test_out_of_range_is_said_with_the_range(name, value, rule):
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be {rule}$"):
        cli.nested(Config, {name: value})


def test_the_table_names_fields_only():
    """A field that was renamed would fall back to the usual range without a word."""
    known = {f.name for _, f in cli.options(Config).values()}
    assert set(cli.RULE) <= known and set(cli.RULE.values()) <= set(cli.RANGES)


@pytest.mark.parametrize("name", [name for name, (_, f) in cli.options(Config).items() if get_args(f.type)])
def test_a_choice_is_one_of_its_list(name):
    choices = get_args(cli.options(Config)[name][1].type)
    with pytest.raises(ValueError, match=f"^{name} is 'x0'; it must be one of {', '.join(choices).replace('+', '.')}$"):
        cli.nested(Config, {name: "x0"})
    assert cli.options(Config)[name][1].default in choices


# ---- What a file holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, sentence", [
    (None, "holds no Whole"), ([], "holds no Whole"), ({"loud": 1}, "loud is 1; it must be of type bool"), ({"out": None}, "out is None; it must be of type str"),
    ({"more": 1}, "Whole has an unknown more"), ({7: 1}, "Whole has an unknown 7"), ({"autoencoder": 3}, "holds no Part"), ({"autoencoder": {}}, "Part lacks long_one"),
    ({"autoencoder": asdict(Part()) | {"size": True}}, "vae_size is True; it must be of type int"), ({"autoencoder": asdict(Part()) | {"size": 2.0}}, "vae_size is 2.0; it must be of type int"),
    ({"autoencoder": asdict(Part()) | {"size": "2"}}, "vae_size is '2'; it must be of type int"), ({"autoencoder": asdict(Part()) | {"rate": math.nan}}, "vae_rate is nan; it must be above 0"),
    ({"autoencoder": asdict(Part()) | {"silent": 3}}, "vae_silent is 3; it must be of type tuple"), ({"autoencoder": asdict(Part()) | {"silent": [1, [2]]}}, "vae_silent is [1, [2]]; it must be above 0"),
    ({"autoencoder": asdict(Part()) | {"long_one": ["a"]}}, "vae_long_one is ['a']; it must be one of a, b"),
], ids=str)  # fmt: skip
def test_what_a_file_holds_is_not_believed(change, sentence):
    good = asdict(Whole())
    with pytest.raises(ValueError) as error:
        cli.make(Whole, good | change if isinstance(change, dict) else change, "here.pt")
    assert str(error.value) == f"here.pt: {sentence}"
    assert cli.make(Whole, good, "here.pt") == Whole()


def test_a_key_that_lacks_is_named():
    values = asdict(Whole())
    del values["loud"]
    with pytest.raises(ValueError, match="^here.pt: Whole lacks loud$"):
        cli.make(Whole, values, "here.pt")


def test_what_json_makes_of_a_configuration_is_taken():
    """Lists for tuples, whole numbers for fractions."""
    values = asdict(Whole()) | {"autoencoder": asdict(Part()) | {"silent": [4, 5], "rate": 1}}
    assert cli.make(Whole, values, "here.json").autoencoder == Part(silent=(4, 5), rate=1)


# ---- Errors ---------------------------------------------------------------------------------------------------------


def stopped_by(error):
    def work():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.report_errors(work)
    return stop.value.code


@pytest.mark.parametrize("error, sentence", [
    (ValueError("lr is -1"), "error: lr is -1"), (FloatingPointError("no number"), "error: no number"),
    (OSError(errno.ENOSPC, "No space left on device", "a.pt"), "error: [Errno 28] No space left on device: 'a.pt'"),
    (ValueError("bad\x1b[2J\x07 name\nin two lines\x9b\u202e\ud800"), "error: bad\\x1b[2J\\x07 name in two lines\\x9b\\u202e\\ud800"),
])  # fmt: skip
def test_an_error_is_one_line_that_does_nothing_to_the_terminal(error, sentence):
    assert stopped_by(error) == sentence


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
    RuntimeError("MPS backend out of memory"), RuntimeError("Storage size calculation overflowed with sizes=[1]"),
], ids=lambda error: str(error)[:20])  # fmt: skip
def test_no_memory_is_one_sentence(error):
    code = stopped_by(error)
    assert code.startswith("error: out of memory; try") and "\n" not in code and "--micro_rows" in code


def test_memory_that_cannot_be_had():
    """As torch and numpy really say it."""
    for work in (lambda: torch.empty(2**55), lambda: torch.empty(2**31, 2**31, 2**31), lambda: np.empty(2**55, np.uint8)):
        with pytest.raises(SystemExit, match="error: out of memory"):
            cli.report_errors(work)


def test_a_mistake_of_ours_keeps_its_traceback():
    for error in (TypeError("x"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x")):

        def work():
            raise error

        with pytest.raises(type(error)):
            cli.report_errors(work)


def test_text_of_others_is_printed_as_it_is_but_for_what_moves_the_cursor():
    for text in ("a red circle", "Stühle\u3000、\u200d“”", "two\nlines\tand a tab"):
        assert cli.printable(text) == text
    assert cli.printable("\x00\x1b]0;title\x07\r\u2028") == "\\x00\\x1b]0;title\\x07\\r\\u2028"


# ---- Devices and prompts --------------------------------------------------------------------------------------------


def test_devices(monkeypatch):
    assert cli.pick_device("cpu") == torch.device("cpu")
    for cuda, mps, best in ((False, False, "cpu"), (False, True, "mps"), (True, True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert cli.pick_device("auto") == torch.device(best)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "tpu", ""):
        with pytest.raises(ValueError, match=f"--device {name}: torch sees none here; .*auto, cpu, cuda or mps"):
            cli.pick_device(name)


def test_prompts_are_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red circle\r\n\n  a blue\u2028square \n".encode())
    assert cli.read_prompts(path) == ["a red circle", "a blue square"]
    for content, said in ((b"\n \n", "holds no prompt"), (b"caf\xe9", "is not UTF-8 text")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"prompts.txt: {said}"):
            cli.read_prompts(path)
    with pytest.raises(ValueError, match="none.txt: no such file"):
        cli.read_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        cli.read_prompts(tmp_path)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "vae.py"])
def test_every_script_has_help_and_names_a_wrong_option(script):
    code, out, _ = run_here(script, "--help")
    assert code == 0 and "--device" in out and "--guidance_scale" in out
    code, _, err = run_here(script, *flags(devic="cpu"))
    assert code == 1 and err == "error: unknown option --devic; did you mean --device?\n"


# ---- What does nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ["--text", "x.txt"], ["--data", "x", "--text_fraction", "0.3"], ["--data", "x", "--grammar", "rich"], ["--vae", "x", "--vae_steps", "3"],
    ["--tokenizer", "x", "--merges", "3"], ["--init_from", "x", "--dim", "64"], ["--code_temperature", "0"], ["--codebook", "8"], ["--z_loss", "0.1"],
    ["--images", "discrete", "--steps", "3"], ["--images", "discrete", "--sampler", "ddpm"], ["--images", "discrete", "--patch_size", "1"],
    ["--images", "discrete", "--prediction", "eps"], ["--unet_blocks", "2"], ["--t_draw", "uniform", "--t_mean", "1"], ["--shard", "2"],
], ids=" ".join)  # fmt: skip
def test_an_option_without_an_effect_is_refused(words):
    with pytest.raises(ValueError, match=f"{words[-2]} has no effect: "):
        parse(["--config", "small", *words])


@pytest.mark.parametrize("words", [
    ["--text", "x.txt", "--text_fraction", "0.3"], ["--data", "x", "--text", "y", "--text_fraction", "0.3"], ["--vae", "x", "--vae_batch", "3"],
    ["--images", "discrete", "--code_temperature", "0"], ["--patch_encoder", "unet", "--unet_blocks", "2"], ["--t_mean", "1"], ["--fsdp", "--shard", "2", "--optimizer", "adamw"],
], ids=" ".join)  # fmt: skip
def test_an_option_with_an_effect_is_taken(words):
    parse(["--config", "small", *words])


# ---- What is tried out first ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*PRESETS, *extras.PRESETS])
def test_on_a_cpu_a_trial_takes_seconds_or_is_left_out(config, capsys):
    """The paper's sizes say so at once; the others try every stage, with a row and two images."""
    say.cache_clear()
    tried = []

    def set_up(small):
        tried.append((small.rows, small.micro_rows, small.autoencoder.batch, small.max_steps))
        raise ValueError("reached")

    parsed = parse(["--config", config, "--device", "cpu"] + ["--optimizer", "adamw"] * (config == "7b"))[0]
    try:
        rehearse(parsed, set_up, *[None] * 4)
    except ValueError as error:
        assert str(error) == "reached"
    assert bool(tried) == (config not in SIZES) and set(tried) <= {(1, 0, 2, 1)}
    assert ("no stage is tried out first" in capsys.readouterr().err) == (config in SIZES)


@pytest.mark.parametrize("cuda, words, expected", [
    (False, [], "small"), (True, [], "rich"), (True, ["--device", "cpu"], "small"), (True, ["--config", "relations"], None),
])  # fmt: skip
def test_without_a_preset_it_takes_what_suits_the_machine(cuda, words, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config = parse(words)[0]
    assert config.out == f"out/{expected or 'relations'}"
    assert capsys.readouterr().out.startswith(f"--config {expected}: " if expected else "")
    monkeypatch.setenv("RANK", "1")
    parse(words)
    assert capsys.readouterr().out == ""  # one process speaks for all
