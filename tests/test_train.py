"""train.py and the three scripts as a user meets them: a short run from nothing, going on, stopping, and every wrong input."""

import copy
import json
import os
import re
import signal
import sys
from dataclasses import asdict, fields, is_dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, flags, run_here, run_script
from PIL import Image

import extras
import train as recipe
from extras import cli, costs, draw_held_out, load_vae, runs
from extras.cli import report_errors
from extras.runs import load_checkpoint, save_checkpoint
from extras.scenes import Scenes
from model import SIZES
from sample import load
from train import PRESETS, Config, Objective, averaged_model, averaged_weights, learning_rate, parse, save, set_up, train_step, validate


def config_of(out, **change):
    """The Config of a tiny run, as the command line makes it."""
    return parse(flags(**TINY | dict(out=out) | change))[0]


def log(run, values):
    run.log.write(run.step, values)


def weights(run):
    return {f"{kind}.{name}": value for kind, state in (("model", run.model.state_dict()), ("ema", averaged_weights(run))) for name, value in state.items()}


def assert_same_weights(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- From nothing to pictures, as processes -------------------------------------------------------------------------


def test_small_trains_from_nothing(small_run):
    folder, code, out, err = small_run
    assert code == 0, err
    made = folder / "out/small"
    assert {"checkpoint.pt", "vae.pt", "log.jsonl", "scores.json", "samples_000004.png", "report.html", "curves.png"} <= {p.name for p in made.iterdir()}
    assert not list(made.glob("*.partial")) and Image.open(made / "samples_000004.png").width > 500
    assert "held out, prompts" in out and "python sample.py --ckpt" in out  # the table, and what to type next
    assert set(json.loads((made / "scores.json").read_text())["splits"]) == {"seen", "held_out", "never_seen"}
    lines = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4 and {"lm", "ddpm", "norm", "lr"} <= lines[0].keys() and 0.8 < lines[0]["fill"] <= 1 and "  norm " in out
    assert all(f"val_ddpm_q{n}" in lines[-1] for n in (1, 2, 3, 4)) and lines[-1]["val_lm"] > 0 and 0.5 < lines[-1]["val_ddpm"] < 2


def test_everything_in_the_checkpoint_loads_with_weights_only(small_run):
    path = small_run[0] / "out/small/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert {"config", "step", "tokenizer", "vae_config", "model", "ema", "optimizer", "vae", "stream"} <= state.keys()
    trained = load(path.parent)  # the folder will do
    assert trained.model.config.vocab_size == trained.tokenizer.vocab_size and not trained.model.training
    assert_same_weights(load_vae(path).state_dict(), trained.vae.state_dict())  # the VAE of a checkpoint is done, whatever its step


def test_sample_and_evaluate_as_processes(small_run, tmp_path):
    """Each finds the newest checkpoint under out/ by itself."""
    folder = small_run[0]
    code, out, err = run_script("sample.py", "--prompt", "a red circle at the top left", "--num", 2, "--out", tmp_path / "drawn", cwd=folder)
    assert code == 0, err
    assert {p.name for p in (tmp_path / "drawn").iterdir()} == {"000.png", "001.png", "sheet.png"}
    drawn = Image.open(tmp_path / "drawn" / "000.png")
    assert drawn.size == (32, 32) and "a red circle at the top left" in drawn.info["prompt"] and "seed 0" in drawn.info["settings"]
    code, out, err = run_script("evaluate.py", "--judged", 2, "--json", tmp_path / "scores.json", cwd=folder)
    assert code == 0, err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["judged"] == 2 and "held out, captions" in out
    assert set(scores["splits"]["held_out"]) == {"n", "prompts", "captions", "perplexity_per_token", "perplexity_per_byte"}


def test_sample_captions_a_picture_continues_both_or_starts_by_itself(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(small_run[0])
    Image.new("RGBA", (50, 40), "red").save(tmp_path / "x.png")
    code, out, err = run_here("sample.py", "--image", tmp_path / "x.png", "--max_tokens", 5, "--out", tmp_path / "a")
    assert code == 0 and out.startswith("0: ") and not (tmp_path / "a").exists(), err
    code, out, err = run_here("sample.py", "--image", tmp_path / "x.png", "--prompt", "a red circle", "--num", 1, "--out", tmp_path / "b")
    assert code == 0 and sorted(os.listdir(tmp_path / "b")) == ["000.png", "page.html"], err
    code, out, err = run_here("sample.py", "--max_tokens", 5, "--num", 3, "--out", tmp_path / "c")
    assert code == 0 and [line[:2] for line in out.splitlines()[:3]] == ["0:", "1:", "2:"], err


def test_same_seed_same_pictures(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(small_run[0])
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run_here("sample.py", "--prompt", "a red circle", "--num", 1, "--seed", seed, "--out", tmp_path / out)[0] == 0
    a, b, c = (Image.open(tmp_path / out / "000.png").tobytes() for out in "abc")
    assert a == b != c


def test_a_folder_takes_the_place_of_the_scenes(tmp_path):
    """--data, from nothing: VAE, transformer, and a score of captions."""
    (tmp_path / "data").mkdir()
    for i in range(20):
        Image.new("RGB", (40, 32), (12 * i, 0, 99)).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text("a dark one" if i < 10 else "a bright one")
    code, out, err = run_here("train.py", *flags(**TINY, data=tmp_path / "data", out=tmp_path / "out"))
    assert code == 0, err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["splits"]
    assert set(scores) == {"seen", "held_out"} and "captions" in scores["held_out"] and "prompts" not in scores["held_out"]


# ---- Stopping and going on ------------------------------------------------------------------------------------------


def test_ctrl_c_saves_and_resume_ends_where_a_straight_run_does(trained_vae, tmp_path, monkeypatch, capsys):
    """Bit for bit: weights, averaged weights and the log's last line."""
    change = dict(vae=trained_vae, max_steps=6, log_every=1)
    straight = recipe.train(config_of(tmp_path / "straight", **change))

    monkeypatch.setattr(recipe, "train_step", lambda run: (os.kill(os.getpid(), signal.SIGINT) if run.step == 2 else None, train_step(run))[1])
    with pytest.raises(SystemExit) as stop:
        report_errors(lambda: recipe.train(config_of(tmp_path / "stopped", **change)), runs.STOPPED)
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "stopped/checkpoint.pt")["step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ctrl-C is Ctrl-C again

    resumed = recipe.train(config_of(tmp_path / "stopped", **change), resume=True)
    assert_same_weights(weights(straight), weights(resumed))
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("straight", "stopped")]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4, 5, 6, 6] and logs[0][-1] == logs[1][-1]


def test_ctrl_c_while_the_vae_trains(tmp_path, monkeypatch, capsys):
    change = dict(vae_steps=6, max_steps=1)
    straight = set_up(config_of(tmp_path / "straight", **change))
    drawn, pair = iter(range(10**6)), Scenes.pair

    def pair_and_press(scenes, index):
        if next(drawn) == 2000 + 9:  # the tokenizer reads 2000 captions first; then each step takes 4 pictures
            os.kill(os.getpid(), signal.SIGINT)
        return pair(scenes, index)

    monkeypatch.setattr(Scenes, "pair", pair_and_press)
    with pytest.raises(SystemExit) as stop:
        report_errors(lambda: recipe.train(config_of(tmp_path / "stopped", **change)), runs.STOPPED)
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    state = load_checkpoint(tmp_path / "stopped/vae.pt")
    assert 0 < state["step"] < 6 and not state.get("done")
    message = complaint("train.py", *flags(**TINY | dict(out=tmp_path / "other", vae=tmp_path / "stopped/vae.pt")))
    assert "vae.pt: its training was stopped at step" in message and "--resume" in message
    resumed = set_up(config_of(tmp_path / "stopped", **change), resume=True)
    assert_same_weights(straight.vae.state_dict(), resumed.vae.state_dict())
    assert_same_weights(load_vae(tmp_path / "stopped/vae.pt").state_dict(), resumed.vae.state_dict())


def test_steps_saved_and_resumed_equal_steps_in_a_row(trained_vae, tmp_path):
    change = dict(vae=trained_vae, max_steps=20, rows=3)
    straight, first = set_up(config_of(tmp_path / "a", **change)), set_up(config_of(tmp_path / "b", **change))
    values = [train_step(straight) for _ in range(6)]
    assert [train_step(first) for _ in range(3)] == values[:3]
    save(first)
    second = set_up(config_of(tmp_path / "b", **change), resume=True)
    assert second.step == 3 and [train_step(second) for _ in range(3)] == values[3:]
    assert_same_weights(weights(straight), weights(second))
    assert validate(straight) == validate(second)


def test_seeds_decide(trained_vae, tmp_path):
    a, b, c = (set_up(config_of(tmp_path / name, vae=trained_vae, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    values = [train_step(run) for run in (a, b, c)]
    assert values[0] == values[1] != values[2]


def test_validation_leaves_training_as_it_was(trained_vae, tmp_path):
    a, b = (set_up(config_of(tmp_path / name, vae=trained_vae)) for name in "ab")
    train_step(a), train_step(b)
    assert validate(a) == validate(a)
    draw_held_out(averaged_model(a), 0, tmp_path / "x.png", n=2)
    assert train_step(a) == train_step(b)


def test_validation_compiles_nothing_anew(trained_vae, tmp_path):
    """Two graphs of the blocks, with gradients and without, both of fixed shapes; FlexAttention's are slower where a shape varies."""
    run = set_up(config_of(tmp_path / "out", vae=trained_vae, rows=4, micro_rows=2, eval_documents=40))
    graphs = []

    def backend(graph, inputs):
        graphs.append("varies" if any(isinstance(n, torch.SymInt) for x in inputs for n in (x, *getattr(x, "shape", ()))) else "fixed")
        return graph

    torch._dynamo.reset()
    for block in run.model.blocks:
        block.compile(backend=backend, fullgraph=True)
    train_step(run), validate(run), train_step(run)
    assert len(run.validation) > 2 and graphs == ["fixed", "fixed"]


def test_each_micro_batch_is_prepared_as_it_is_run(trained_vae, tmp_path, monkeypatch):
    """Or the pictures of a whole step would lie on the GPU at once."""
    run, order, prepare = set_up(config_of(tmp_path / "out", vae=trained_vae, rows=4, micro_rows=2)), [], Objective.latents_and_noise

    def spy(objective, *args, **kwargs):
        order.append("prepare")
        found = prepare(objective, *args, **kwargs)
        assert not found[0].images.numel() and len(found[1])
        return found

    monkeypatch.setattr(Objective, "latents_and_noise", spy)
    run.model.register_forward_pre_hook(lambda *_: order.append("forward"))
    train_step(run)
    assert order == ["prepare", "forward"] * 2


def test_the_logged_time_is_the_mean_since_the_last_line(trained_vae, tmp_path, monkeypatch):
    clock = iter([0, 1, 10, 13, 50, 54])  # steps of 1, 3 and 4 seconds, and something else between them
    monkeypatch.setattr(recipe, "time", SimpleNamespace(time=lambda: 0.0, perf_counter=lambda: float(next(clock))))
    recipe.train(config_of(tmp_path / "out", vae=trained_vae, max_steps=3, log_every=2))
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["ms"] for line in lines[:2]] == [2000, 4000] and lines[0]["tokens_per_s"] == 2 * 112 / 2


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(trained_vae, tmp_path):
    run = set_up(config_of(tmp_path / "out", vae=trained_vae, lr=1e30, warmup=1, clip=1e30))
    save(run)
    before = copy.deepcopy(load_checkpoint(run.checkpoint))
    with pytest.raises(FloatingPointError, match="lower --lr .*--resume"):
        for _ in range(4):
            train_step(run)
    after = load_checkpoint(run.checkpoint)
    assert_same_weights(before["model"], after["model"])
    assert load(run.checkpoint).model.head.weight.isfinite().all()


def test_gradient_that_is_not_finite_never_reaches_the_weights(trained_vae, tmp_path):
    """The loss may still be finite when its gradient overflows; weights turned NaN would be saved over good ones."""
    run = set_up(config_of(tmp_path / "out", vae=trained_vae))
    run.model.head.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(FloatingPointError):
        train_step(run)
    assert all(value.isfinite().all() for value in weights(run).values())


def test_full_disk_while_saving_is_one_sentence(trained_vae, tmp_path, monkeypatch):
    run = set_up(config_of(tmp_path / "out", vae=trained_vae))
    save(run)

    def disk_full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(SystemExit) as stop:
        report_errors(lambda: save(run))
    assert "No space left" in stop.value.code and "intact" in stop.value.code and "\n" not in stop.value.code
    monkeypatch.undo()
    assert load(run.checkpoint)


def test_wandb_gets_what_the_log_gets(trained_vae, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(ValueError, match="pip install wandb"):
        set_up(config_of(tmp_path / "a", vae=trained_vae, wandb="project"))
    seen, started = [], {}
    logger = SimpleNamespace(id="x1", log=lambda values, step: seen.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: started.update(options) or logger))
    run = set_up(config_of(tmp_path / "b", vae=trained_vae, wandb="project"))
    log(run, train_step(run))
    line = json.loads((tmp_path / "b/log.jsonl").read_text())
    assert started["project"] == "project" and started["config"]["lr"] == run.config.lr and [(line.pop("step"), line)] == seen
    log(run, validate(run))
    assert {"val_lm", "val_ddpm", "val_ddpm_q1", "val_ddpm_q4"} <= seen[-1][1].keys() and all(isinstance(v, float) for v in seen[-1][1].values() if v is not None)
    save(run)
    set_up(run.config, resume=True)
    assert started["id"] == "x1" and started["resume"] == "allow"  # it goes on in the same run


def test_a_killed_run_leaves_no_lines_that_are_logged_again(trained_vae, tmp_path):
    run = set_up(config_of(tmp_path, vae=trained_vae))
    for n in range(3):
        log(run, train_step(run))
        if n == 1:
            save(run)
    run.log.file.write(b'{"step": 4, "l')  # killed
    again = set_up(run.config, resume=True)
    log(again, train_step(again))
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


# ---- The recipe -----------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_to_its_end():
    config = Config(lr=1.0, min_lr=0.1, warmup=10, max_steps=110)
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_averaged_weights_lag_behind(trained_vae, tmp_path):
    """The first average takes 9/10 of the new weights: (1 + step) / (10 + step) of the old."""
    run = set_up(config_of(tmp_path / "out", vae=trained_vae))
    before = run.model.head.weight.detach().clone()
    train_step(run)
    torch.testing.assert_close(averaged_weights(run)["head.weight"], 0.1 * before + 0.9 * run.model.head.weight.detach())


def test_images_without_noise_have_no_loss(trained_vae, tmp_path):
    """An image that only conditions (max_t 0) is shown clean, and does not enter the mean."""
    run = set_up(config_of(tmp_path / "out", vae=trained_vae))
    batch = next(run.loader)
    batch.max_t[:] = 0
    batch, x_0, t, eps = run.objective.latents_and_noise(batch, range(len(batch.tokens)), (0,))
    assert len(t) and (t == 0).all() and torch.equal(run.ddpm.q_sample(x_0, t, eps), x_0)


@pytest.mark.parametrize("name", [*PRESETS, *extras.PRESETS])
def test_presets_build(name):
    config, resume = parse(["--config", name])
    assert config.out == f"out/{name}" and not resume
    assert asdict(cli.make(Config, asdict(config), name)) == asdict(config)  # as from a checkpoint


@pytest.mark.parametrize("name", SIZES)
def test_the_papers_sizes_keep_the_papers_recipe(name):
    c = parse(["--config", name])[0]
    assert (c.lr, c.min_lr, c.warmup, c.beta1, c.beta2, c.weight_decay, c.clip) == (3e-4, 1.5e-5, 4000, 0.9, 0.95, 0.1, 1.0)
    assert c.rows * c.data.seq_len == 2**21 and c.max_steps == 250_000 and c.lambda_ddpm == 5 and c.sampling.steps == 250
    assert (c.diffusion.timesteps, c.diffusion.prediction, c.diffusion.t_draw, c.model.qk_norm) == (1000, "eps", "uniform", False)
    assert (c.data.image_size, c.data.caption_first, c.data.drop_caption, c.data.image_first_max_t) == (256, 0.8, 0.1, 1000)


def test_options_reach_their_place():
    config, resume = parse(["--config", "small", "--lr", "1e-3", "--dim", "64", "--n_heads", "2", "--grammar", "relations", "--vae_lr", "2e-3", "--prediction", "eps",
                            "--qk_norm", "false", "--vae_channel_multiples", "1,2", "--resume", "--out", "x/y"])  # fmt: skip
    assert (config.lr, config.model.dim, config.extra.grammar, config.autoencoder.lr, config.diffusion.prediction) == (1e-3, 64, "relations", 2e-3, "eps")
    assert config.model.qk_norm is False and config.autoencoder.channel_multiples == (1, 2) and resume and config.out == "x/y"
    assert parse(["--config", "small"])[0].lr == PRESETS["small"]["lr"]  # overriding leaves the preset as it was


def test_every_field_is_an_option_under_one_name():
    parts = [f.default_factory for f in fields(Config) if is_dataclass(f.default_factory)]
    names = sum(len(fields(part)) for part in parts) + len(fields(Config)) - len(parts)
    assert len(parts) == 6 and len(cli.flat(parse(["--config", "small"])[0])) == names


# ---- Bad input: one sentence, no traceback, a non-zero exit code ------------------------------------------------------


def complaint(script, *args):
    """What a script says as it gives up; fails if it does not, or with a traceback."""
    code, _, err = run_here(script, *args)
    said = [line for line in err.splitlines() if line.strip() and not re.search(r"\d+/\d+ \[|^skipped: |: reading it once|, the newest under out|, for no run is under out|^no caption of training had", line)]  # without progress bars
    assert code not in (0, None) and said, (code, err)
    assert "Traceback" not in err and ("usage:" in err or len(said) == 1), err
    return said[-1]


@pytest.mark.parametrize("args, expected", [
    (["--lrr", "1"], "--lr"), (["--guidance-scale", "2"], "--guidance_scale"), (["--vae_step=3"], "--vae_steps"), (["--resum"], "--resume"),
    (["--config", "smal"], "small"), (["--config", "0.16B"], "0.16b"), (["--lr", "abc"], "abc"), (["--rows", "1.5"], "1.5"),
    (["--qk_norm", "maybe"], "maybe"), (["--vae_channel_multiples", "1,x"], "1,x"), (["--lr"], "--lr"),
    (["--prediction", "x0"], "eps, v"), (["--device", "tpu"], "auto, cpu, cuda, mps"), (["--sampler", "euler"], "ddpm, ddim"),
    (["--grammar", "haiku"], "places, relations, rich"), (["--t_draw", "normal"], "uniform, logit_normal"), (["--drop_caption", "2"], "between 0 and 1"),
    (["--attention", "flex"], "needs CUDA"), (["--fsdp"], "muon"), (["--optimizer", "sgd"], "adamw, muon"), (["--compile", "maybe"], "auto, on, off"),
    (["--rows", "0"], "rows"), (["--lr", "-1"], "lr"), (["--steps", "0"], "steps"), (["--dim", "50", "--n_heads", "3"], "multiple of 6"),
    (["--judged", "0"], "judged"), (["--micro_rows", "-1"], "micro_rows is -1"), (["--ema", "1"], "ema is 1.0"), (["--ema", "nan"], "below 1"),
    (["--shard", "2"], "--fsdp"),    (["--lambda_ddpm", "-5"], "lambda_ddpm is -5"), (["--lambda_ddpm", "inf"], "lambda_ddpm"), (["--lr", "inf"], "lr is inf"), (["--seed", "-1"], "seed is -1"),
    (["--beta2", "1"], "beta2"), (["--code_top_p", "0"], "code_top_p"), (["--patch_encoder", "conv"], "linear, unet"), (["--patch_encoder", "unet", "--unet_channels", "100"], "multiple of"),
], ids=lambda value: value if isinstance(value, str) else " ".join(value))  # fmt: skip
def test_wrong_options_of_train(args, expected, tmp_path):
    config = [] if "--config" in args else ["--config", "small"]
    message = complaint("train.py", *config, *args, *([] if "--out" in args else ["--out", tmp_path / "out", "--vae", tmp_path / "none.pt"]))
    assert expected in message and "none.pt" not in message  # refused for what is wrong, before anything is made
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, expected", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce RTX 4090", None),
])  # fmt: skip
def test_the_peak_is_of_the_very_device(name, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert costs.peak_flops(torch.device("cuda")) == expected


def test_a_length_that_flex_attention_does_not_take_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "join", lambda name: (0, 1, torch.device("cuda")))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    (tmp_path / "file").write_text("in the way")
    for seq_len, lines in ((112, 1), (128, 0)):
        with pytest.raises(ValueError, match="is not a folder"):
            set_up(config_of(tmp_path / "file", seq_len=seq_len, compile="on"))
        assert capsys.readouterr().out.count(f"multiple of 128, not {seq_len}") == lines


def test_one_process_speaks_for_all(monkeypatch, capsys):
    """Under torchrun: of an interrupt only the first process of a node; of an error, another one only if it is still there a while later."""
    slept = []
    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=slept.append))

    def interrupted():
        raise KeyboardInterrupt

    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            report_errors(interrupted, runs.STOPPED)
        assert capsys.readouterr().err.count("stopped") == lines
        with pytest.raises(SystemExit, match="error: "):
            report_errors(lambda: cli.make(Config, {"lr": -1}, "here"))
        assert len(slept) == int(rank)


@pytest.mark.parametrize("script, args, expected", [
    ("sample.py", ["--promt", "x"], "--promt"), ("sample.py", ["--num", "x"], "x"), ("sample.py", ["--num", "0", "--prompt", "x"], "--num"),
    ("sample.py", ["--steps", "2000", "--prompt", "x"], "between 1 and 1000"), ("sample.py", ["--sampler", "euler"], "euler"),
    ("sample.py", ["--steps", "-1", "--prompt", "x"], "-1"), ("sample.py", ["--steps", "0", "--prompt", "x"], "between 1 and 1000"),
    ("sample.py", ["--prompt", ""], "prompt is empty"), ("sample.py", ["--prompt", "a red circle " * 200], "positions; at most"),
    ("evaluate.py", ["--judge", "3"], "--judge"), ("evaluate.py", ["--judged", "x"], "x"), ("evaluate.py", ["--judged", "0"], "judged"),
])  # fmt: skip
def test_wrong_options_of_sample_and_evaluate(script, args, expected, small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(small_run[0])
    out = ["--out", str(tmp_path / "out")] if script == "sample.py" else []
    assert expected in complaint(script, *args, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, args, nearest", [("sample.py", ["--promt", "x"], "--prompt"), ("evaluate.py", ["--judge", "3"], "--judged")])
def test_sample_and_evaluate_name_the_nearest_option(script, args, nearest):
    assert f"did you mean {nearest}" in complaint(script, *args)


def bad_checkpoint(kind, path, small_run):
    """A file at `path` that is not what it should be."""
    good = small_run[0] / "out/small/checkpoint.pt"
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:-3000])
    elif kind == "random bytes":
        path.write_bytes(bytes(range(256)) * 40)
    elif kind == "of other sizes":
        state = load_checkpoint(good)
        state["config"]["model"]["dim"] *= 2
        save_checkpoint(path, state)
    elif kind == "of a VAE":
        path.write_bytes((small_run[0] / "out/small/vae.pt").read_bytes())
    elif kind == "of another program":
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)


@pytest.mark.parametrize("kind", ["missing", "truncated", "random bytes", "of other sizes", "of a VAE", "of another program"])
@pytest.mark.parametrize("script", ["sample.py", "evaluate.py"])
def test_bad_checkpoint(kind, script, small_run, tmp_path):
    path = tmp_path / "bad.pt"
    bad_checkpoint(kind, path, small_run)
    assert "bad.pt: " in complaint(script, *(["--ckpt", path, "--prompt", "x"] if script == "sample.py" else [path]))


@pytest.mark.parametrize("script", ["sample.py", "evaluate.py"])
def test_no_checkpoint_at_all(script, tmp_path, monkeypatch):
    """Not even the weights that come along."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "IN_THE_BOX", tmp_path / "box.safetensors")
    assert "box.safetensors: no such file" in complaint(script)


@pytest.mark.parametrize("kind", ["missing", "truncated", "random bytes", "of another program"])
def test_bad_vae(kind, small_run, tmp_path):
    bad_checkpoint(kind, tmp_path / "bad.pt", small_run)
    assert "bad.pt: " in complaint("train.py", *flags(**TINY, out=tmp_path / "out", vae=tmp_path / "bad.pt"))


@pytest.mark.parametrize("kind", ["truncated", "random bytes", "of a VAE", "of another program"])
def test_resuming_from_a_bad_checkpoint(kind, small_run, tmp_path):
    bad_checkpoint(kind, tmp_path / "checkpoint.pt", small_run)
    message = complaint("train.py", *flags(**TINY, out=tmp_path, vae=small_run[0] / "out/small/vae.pt"), "--resume")
    assert "checkpoint.pt: " in message


@pytest.mark.parametrize("change, expected", [
    (dict(dim=64), "dim 32, not 64"), (dict(seed=1), "seed 0, not 1"), (dict(caption_first=0.5), "caption_first 0.3, not 0.5"), (dict(t_mean=0), "t_mean 0.7, not 0.0"),
    (dict(optimizer="adamw"), "optimizer muon, not adamw"), (dict(rows=4), "rows 2, not 4"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_resuming_with_another_recipe(change, expected, trained_vae, tmp_path):
    save(set_up(config_of(tmp_path, vae=trained_vae)))
    message = complaint("train.py", *flags(**TINY | change, out=tmp_path, vae=trained_vae), "--resume")
    assert "checkpoint.pt: " in message and expected in message


def test_resuming_tells_what_else_has_changed(trained_vae, tmp_path, capsys):
    save(set_up(config_of(tmp_path, vae=trained_vae)))
    capsys.readouterr()
    set_up(config_of(tmp_path, vae=trained_vae, max_steps=9, lr=1e-3, workers=1, micro_rows=1, log_every=1), resume=True)
    assert capsys.readouterr().out == "--resume: changed from here on: max_steps 4 -> 9, lr 0.003 -> 0.001\n"


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_output_folder_that_cannot_be_written(script, small_run, trained_vae, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        args = flags(**TINY, vae=trained_vae) if script == "train.py" else flags(ckpt=small_run[0] / "out/small", prompt="a red circle", steps=1)
        assert "file" in complaint(script, *args, "--out", out)
    assert (tmp_path / "file").read_text() == "in the way"


def test_scores_that_cannot_be_written(small_run, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file is not a folder" in complaint("evaluate.py", small_run[0] / "out/small", "--judged", 1, "--json", tmp_path / "file" / "scores.json")


@pytest.mark.parametrize("content", [None, b"", b"not a picture"])
def test_image_that_is_no_image(content, small_run, tmp_path):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    assert "x.png: " in complaint("sample.py", "--ckpt", small_run[0] / "out/small", "--image", tmp_path / "x.png")


@pytest.mark.parametrize("files, expected", [
    ({}, "no pictures"), ({"a.txt": b"text"}, "no pictures"), ({"a.png": None, "b.png": None}, "without a caption"),
    ({"a.png": None, "a.txt": b" ", "b.png": None, "b.txt": b" "}, "empty"),
    ({"a.png": b"broken", "a.txt": b"a", "b.png": b"broken", "b.txt": b"b"}, "cannot be read as an image"),
    ({"a.png": None, "a.txt": b"a"}, "picture"), ({"a.png": None, "b.png": None, "a.txt": b"a " * 999, "b.txt": b"b " * 999}, "seq_len"),
], ids=["empty", "text only", "without caption", "empty caption", "no images", "one picture", "overlong captions"])  # fmt: skip
def test_data_folder_that_will_not_do(files, expected, trained_vae, tmp_path):
    (tmp_path / "data").mkdir()
    for name, content in files.items():
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / name) if content is None else (tmp_path / "data" / name).write_bytes(content)
    assert expected in complaint("train.py", *flags(**TINY | dict(merges=0), out=tmp_path / "out", vae=trained_vae, data=tmp_path / "data"))


def test_data_folder_that_is_not_there(trained_vae, tmp_path):
    assert "absent" in complaint("train.py", *flags(**TINY, out=tmp_path / "out", vae=trained_vae, data=tmp_path / "absent"))


def test_rows_too_short_for_a_document(trained_vae, tmp_path):
    assert "seq_len" in complaint("train.py", *flags(**TINY, seq_len=20, out=tmp_path / "out", vae=trained_vae))


@pytest.mark.parametrize("change", [dict(image_size=36, patch_size=2), dict(image_size=33)])
def test_pictures_that_do_not_fit_the_patches(change, trained_vae, tmp_path):
    """36 pixels are 9 latent pixels, which patches of 2 do not divide; 33 are no whole number of them."""
    message = complaint("train.py", *flags(**TINY, **change, out=tmp_path / "out", vae=trained_vae))
    assert "patch_size" in message or "image_size" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py"])
def test_a_device_that_is_not_there(script, small_run, tmp_path):
    ckpt = small_run[0] / "out/small"
    args = {"train.py": flags(**TINY, out=tmp_path), "sample.py": ["--ckpt", ckpt, "--prompt", "x"], "evaluate.py": [ckpt]}[script]
    assert "cuda" in complaint(script, *args, "--device", "cuda")


def test_as_a_process_too_there_is_no_traceback(tmp_path):
    code, out, err = run_script("train.py", "--config", "small", "--lrr", "1e-3", cwd=tmp_path)
    assert code == 1 and err.startswith("error: unknown option --lrr; did you mean --lr?") and len(err.splitlines()) == 1
