"""The run's folder, and how a run ends: nothing that was trained is lost, and whoever is in the way is told so in one sentence."""

import contextlib
import json
import os
import pty
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import ROOT, TINY, flags
from PIL import Image
from test_distributed import torchrun
from test_train import assert_same_weights, complaint, config_of

import extras
import train as recipe
from extras import runs
from extras.cli import report_errors
from extras.logs import Log
from extras.runs import Interrupt, Lines, claim, load_checkpoint, lock
from extras.show import contact_sheet
from extras.sources import say
from sample import load
from tqdm import tqdm
from train import save, set_up, train_step
from vae import VAE

ENDS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
names = [one.name for one in ENDS]


def contents(folder):
    """Every file of a folder but its lock: {name: bytes}."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def steps_logged(folder):
    log = folder / "log.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


# ---- Nothing is written over ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["*", "vae.pt", "checkpoint.pt", "log.jsonl", "scores.json", "samples_*.png"])
def test_retyping_the_command_is_refused(left, small_run, tmp_path):
    """Whatever an earlier run left: all of it, or the VAE alone, or the log of a run that was killed before its first checkpoint."""
    for path in (small_run[0] / "out/small").glob(left):
        shutil.copy(path, tmp_path) if path.is_file() else None
    before = contents(tmp_path)
    message = complaint("train.py", *flags(**TINY, out=tmp_path))
    assert f"--out {tmp_path}: holds " in message and "--resume" in message and "another --out" in message
    assert contents(tmp_path) == before and len(before) >= 1 and not (tmp_path / ".rehearsal").exists()


def test_retyping_vae_py_is_refused(small_run, tmp_path):
    shutil.copy(small_run[0] / "out/small/vae.pt", tmp_path)
    before = contents(tmp_path)
    assert "holds vae.pt of an earlier run" in complaint("vae.py", *flags(**TINY, out=tmp_path))
    assert contents(tmp_path) == before


def test_a_vae_in_the_folder_may_be_used_there(small_run, tmp_path):
    """As vae.py leaves it, and as the README has it used."""
    shutil.copy(small_run[0] / "out/small/vae.pt", tmp_path)
    claim(tmp_path, runs.WORK, resume=False)
    before = contents(tmp_path)
    set_up(config_of(tmp_path, vae=tmp_path / "vae.pt"))
    assert contents(tmp_path) == before | {"log.jsonl": b""}


def test_what_a_killed_run_left_half_is_cleared(tmp_path):
    (tmp_path / ".rehearsal").mkdir()
    for name in ("checkpoint.pt.partial", ".rehearsal/checkpoint.pt", "notes.txt", "log.jsonl"):
        (tmp_path / name).write_text("" if name == "log.jsonl" else "half")
    claim(tmp_path, runs.WORK, resume=False)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", ".lock", "log.jsonl"}


def test_without_a_checkpoint_the_log_begins_again(trained_vae, tmp_path):
    run = set_up(config_of(tmp_path, vae=trained_vae))
    run.log.write(1, {"lm": 2.0})  # and then it is killed
    run = set_up(run.config, resume=True)
    run.log.write(1, {"lm": 3.0})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "lm": 3.0}\n'


def test_scores_are_the_same_after_a_kill_in_the_evaluation(trained_vae, tmp_path):
    config = config_of(tmp_path, vae=trained_vae)
    recipe.train(config)
    before = contents(tmp_path)
    (tmp_path / "scores.json").unlink()
    recipe.train(config_of(tmp_path, vae=trained_vae), resume=True)
    assert contents(tmp_path)["scores.json"] == before["scores.json"] and b"val_lm" in before["scores.json"]


# ---- One run in a folder --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(folder):
    """Another process has the folder -> its pid."""
    ready, told = os.pipe()
    if not (pid := os.fork()):
        lock(folder)
        os.write(told, b".")
        time.sleep(100)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_run_is_refused_until_the_first_is_dead(trained_vae, tmp_path):
    command = "train.py", *flags(**TINY, out=tmp_path, vae=trained_vae)
    with held(tmp_path) as pid:
        for more in ([], ["--resume"]):
            message = complaint(*command, *more)
            assert f"--out {tmp_path}: process {pid} on {os.uname().nodename} is at work there" in message
        assert "is at work there" in complaint("vae.py", *flags(**TINY, out=tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    set_up(config_of(tmp_path, vae=trained_vae))  # killed: its lock is none
    set_up(config_of(tmp_path, vae=trained_vae))  # and no process is in its own way


def test_where_there_are_no_locks_runs_go_on_without(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)  # some network file systems
    lock(tmp_path)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    lock(tmp_path)


# ---- Signals --------------------------------------------------------------------------------------------------------


def stop_at(monkeypatch, step, *which):
    """Send these signals as this step is begun."""
    pressed = lambda run: [os.kill(os.getpid(), one) for one in which if run.step == step]
    monkeypatch.setattr(recipe, "train_step", lambda run: (pressed(run), train_step(run))[1])


@pytest.fixture(autouse=True)
def without_nohup():
    """Tests that are themselves run under nohup see a closed window, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("which", ENDS, ids=names)
def test_each_signal_saves_and_stops(which, trained_vae, tmp_path, monkeypatch, capfd):
    """Twice within a second, too: a closed window sends SIGHUP from the terminal and from the shell."""
    stop_at(monkeypatch, 1, which, which)
    before = signal.getsignal(which)
    with pytest.raises(SystemExit) as stop:
        report_errors(lambda: recipe.train(config_of(tmp_path, vae=trained_vae)), runs.STOPPED)
    err = capfd.readouterr().err
    assert stop.value.code == 130 and err.count(runs.STOPPED) == 1 and err.count("then saving") == 1
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2 and signal.getsignal(which) == before


def test_sighup_stays_ignored_under_nohup(monkeypatch):
    """But not in torchrun's processes: torchrun itself does not heed nohup, and ends them half a minute later."""
    monkeypatch.setattr(signal, "SIGHUP", signal.SIGUSR2)  # the test's own terminal is left alone
    monkeypatch.setattr(runs, "ENDS", [signal.SIGINT, signal.SIGUSR2])
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert not interrupt.asked
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert interrupt.asked
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_second_signal_stops_at_once_and_says_that_nothing_was_saved(capfd):
    with pytest.raises(SystemExit) as stop, Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        interrupt.since -= 2  # seconds later
        report_errors(lambda: os.kill(os.getpid(), signal.SIGTERM), runs.STOPPED)
    err = capfd.readouterr().err
    assert stop.value.code == 130 and runs.AT_ONCE in err and runs.STOPPED not in err and "without saving" in err


def test_a_signal_inside_is_handed_to_whoever_waits_outside():
    """As where one process of several works and the others wait."""
    with pytest.raises(KeyboardInterrupt), Interrupt() as outer:
        with Interrupt() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.asked and outer.asked


@pytest.mark.parametrize("which", ENDS, ids=names)
def test_a_signal_while_the_statistics_are_measured_is_heeded(which, tmp_path, monkeypatch, capfd):
    measure, change = VAE.measure_statistics, dict(max_steps=1)

    def measured(vae, images, batch):
        os.kill(os.getpid(), which)
        assert load_checkpoint(tmp_path / "stopped/vae.pt")["step"] == TINY["vae_steps"]  # a kill loses nothing, either
        measure(vae, images, batch)

    monkeypatch.setattr(VAE, "measure_statistics", measured)
    with pytest.raises(SystemExit) as stop:
        report_errors(lambda: recipe.train(config_of(tmp_path / "stopped", **change)), runs.STOPPED)
    assert stop.value.code == 130 and runs.STOPPED in capfd.readouterr().err and not (tmp_path / "stopped/checkpoint.pt").exists()
    monkeypatch.undo()
    resumed, straight = set_up(config_of(tmp_path / "stopped", **change), resume=True), set_up(config_of(tmp_path / "straight", **change))
    assert_same_weights(resumed.vae.state_dict(), straight.vae.state_dict())


def test_ctrl_c_in_the_first_seconds_is_one_line(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--config", "small"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(0.7)  # torch is being imported
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130 and err.strip() == "stopped"


# ---- A full disk, and other places that cannot be written to --------------------------------------------------------


@contextlib.contextmanager
def disk_of(n):
    """No file may become larger than n bytes: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_sentence_with_the_file_and_the_cause(trained_vae, tmp_path, monkeypatch):
    run = set_up(config_of(tmp_path, vae=trained_vae))
    save(run)
    sheet = tmp_path / "samples.png"
    monkeypatch.setattr(extras.room("show"), "contact_sheet", lambda *_, **__: Image.effect_noise((500, 500), 50))
    write = {"checkpoint.pt": lambda: save(run), "scores.json": lambda: runs.write_json(tmp_path / "scores.json", list(range(10**5))),
             "samples.png": lambda: extras.draw_held_out(recipe.averaged_model(run), 0, sheet, n=1),
             "log.jsonl": lambda: [run.log.write(1, {"lm": 1.0}) for _ in range(10**4)]}  # fmt: skip
    for name, work in write.items():
        with disk_of(100_000), pytest.raises(OSError) as error:
            work()
        assert str(error.value).startswith(f"{tmp_path / name}: could not be") and "(File too large)" in str(error.value)
        assert "\n" not in str(error.value) and "enforce" not in str(error.value)
    assert not list(tmp_path.glob("*.partial")) and not sheet.exists() and load_checkpoint(run.checkpoint)["step"] == 0


def test_a_stopped_save_leaves_nothing_half(tmp_path):
    with pytest.raises(KeyboardInterrupt), runs.written(tmp_path / "x") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train.py", "vae.py"])
def test_an_out_that_cannot_be_is_found_out_before_training(script, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(extras, "train_vae", lambda *_, **__: pytest.fail("it trains"))
    for out in (tmp_path / "file", tmp_path / "file/below", "/proc/below"):
        assert f"--out: {out} " in complaint(script, *flags(**TINY, out=out))


# ---- Going on with other options, or with the data elsewhere ---------------------------------------------------------


@pytest.mark.parametrize("done", [True, False], ids=["finished", "stopped"])
@pytest.mark.parametrize("change, expected", [
    (dict(vae_channels=16), "vae_channels 8, not 16"), (dict(vae_steps=4), "vae_steps 3, not 4"), (dict(seed=1), "seed 0, not 1"),
    (dict(grammar="relations"), "grammar places, not relations"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_resuming_a_vae_with_other_options_is_refused(done, change, expected, tmp_path):
    stop = None if done else lambda: True
    with contextlib.suppress(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(extras, "train_vae", lambda *args, interrupted, **more: make(*args, interrupted=stop, **more)) if stop else None
        extras.prepare_vae(config_of(tmp_path), torch.device("cpu"))
    before = contents(tmp_path)
    message = complaint("train.py", *flags(**TINY | change, out=tmp_path), "--resume")
    assert f"vae.pt: was trained with {expected}" in message and contents(tmp_path) == before
    assert extras.prepare_vae(config_of(tmp_path, lr=1e-3, max_steps=9), torch.device("cpu"), resume=True)  # of no matter to the VAE


make = extras.train_vae


def picture_folder(folder, n=12):
    folder.mkdir()
    for i in range(n):
        Image.new("RGB", (32, 32), (20 * i, 0, 99)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    return folder


def test_resuming_compares_what_the_data_are(trained_vae, tmp_path, monkeypatch):
    """However the path is spelt, wherever they lie; but no picture more."""
    data, out = picture_folder(tmp_path / "data"), tmp_path / "out"
    change = dict(vae=trained_vae, cache=tmp_path / "cache", text_fraction=0.2)
    (tmp_path / "text.txt").write_text("some text\n\n" * 50)
    save(set_up(config_of(out, data=data, text=tmp_path / "text.txt", **change)))
    monkeypatch.chdir(tmp_path)
    data.rename(tmp_path / "moved")
    for spelt in ("moved", "moved/", tmp_path / "moved", "./out/../moved"):
        set_up(config_of(out, data=spelt, text="./text.txt", **change), resume=True)
    picture_folder(tmp_path / "grown", 13)
    with pytest.raises(ValueError, match="checkpoint.pt: was trained with data 12 pictures .*, not 13 pictures .*; give the options"):
        set_up(config_of(out, data="grown", text="text.txt", **change), resume=True)


# ---- Real processes -------------------------------------------------------------------------------------------------

SERVER = """
import os, runpy, signal, sys, traceback
sys.path.insert(0, ROOT)
import train  # once, for all the processes that are forked from here
for line in sys.stdin:
    folder, *words = line.split("\\t")
    if not (pid := os.fork()):
        os.setpgrp()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd in (1, 2):
            os.dup2(os.open(folder, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
        sys.argv, code = ["train.py", *words[:-1]], 0
        try:
            runpy.run_path(ROOT + "/train.py", run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else print(stop.code, file=sys.stderr) or 1
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Server:
    """Starts train.py in processes of their own, which have torch already."""

    def __enter__(self):
        code = f"ROOT = {str(ROOT)!r}\n{SERVER}"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def run(self, said, words, which=None, after=0.0):
        """Run it, send it a signal after so many seconds -> (exit code, seconds). said: the file for what it says."""
        self.process.stdin.write("\t".join([str(said), *map(str, words), "\n"]))
        self.process.stdin.flush()
        pid, began = int(self.process.stdout.readline()), time.monotonic()
        if which:
            ended, _, _ = select.select([self.process.stdout], [], [], after)
            if not ended:
                os.kill(pid, which)
        return int(self.process.stdout.readline()), time.monotonic() - began


def stage(folder):
    """How far a run has come, from what it left: (VAE's steps, is the VAE finished, steps)."""
    vae, checkpoint = folder / "vae.pt", folder / "checkpoint.pt"
    state = load_checkpoint(vae) if vae.exists() else {"step": 0}
    return state["step"], state.get("done", False), load_checkpoint(checkpoint)["step"] if checkpoint.exists() else 0


@pytest.mark.slow
def test_random_kills_and_signals_lose_nothing(tmp_path):
    """Over all stages: rehearsal, VAE, statistics, steps, validation, saving, sheets, evaluation. KILLS=200 tries more."""
    kills, draw = int(os.environ.get("KILLS", 20)), random.Random(int(os.environ.get("SEED", 0)))
    options = TINY | dict(vae_steps=150, max_steps=100, eval_every=25, log_every=1)
    straight, out = tmp_path / "straight", tmp_path / "out"
    counts, stages, finished = Counter(), Counter(), 0
    with Server() as server:
        code, seconds = server.run(tmp_path / "said", flags(**options, out=straight))
        assert code == 0, (tmp_path / "said").read_text()
        expected = load_checkpoint(straight / "checkpoint.pt")
        while counts.total() < kills or out.exists():
            said = tmp_path / f"said{counts.total()}"
            before, begun = stage(out), out.exists() and any(contents(out))
            which = draw.choice([*ENDS, signal.SIGKILL]) if counts.total() < kills else None  # at last it may finish
            after = draw.uniform(0, seconds if not begun else seconds * (1 - before[2] / 150))
            code, _ = server.run(said, [*flags(**options, out=out), *(["--resume"] if begun else [])], which, after)
            now = stage(out)
            assert now >= before and "Traceback" not in said.read_text(), said.read_text()
            if code:
                assert code in (130, -which), said.read_text()
                logged = steps_logged(out) if code == 130 else []
                assert not logged or logged[-1] == now[2], (which, logged, now)  # what was logged was saved
                assert not now[2] or code != 130 or runs.STOPPED in said.read_text()
                counts[which.name] += 1
                stages["steps" if now[2] > before[2] else "VAE" if now[0] > before[0] else "elsewhere"] += 1
                continue
            assert not list(out.glob("*.partial")) and steps_logged(out) == steps_logged(straight)
            assert (out / "scores.json").read_bytes() == (straight / "scores.json").read_bytes()
            found = load_checkpoint(out / "checkpoint.pt")
            for kind in ("model", "ema", "vae"):
                assert_same_weights(found[kind], expected[kind])
            shutil.rmtree(out)
            finished += 1
    print(f"{dict(counts)} in {dict(stages)}; {finished} runs finished; a run takes {seconds:.1f} s")
    assert min(stages.values()) and len(stages) == 3


def assert_saved(folder):
    """All that was logged was saved."""
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == steps_logged(folder)[-1] < LONG["max_steps"]


LONG = TINY | dict(rows=4, vae_steps=30, max_steps=3000, eval_every=5000, log_every=1)
BOTH = "--standalone", "--nproc_per_node=2", ROOT / "train.py"


@pytest.mark.slow
def test_a_closed_window_loses_nothing(tmp_path):
    """SIGHUP, and a terminal that nothing can be written to any more."""
    pid, window = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *flags(**LONG, out=tmp_path)])
    while len(steps_logged(tmp_path)) < 3:
        if select.select([window], [], [], 0.1)[0]:
            os.read(window, 2**16)
    os.close(window)
    os.waitpid(pid, 0)
    assert_saved(tmp_path)


@pytest.mark.slow
def test_sighup_to_torchrun_under_nohup_loses_nothing(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        process = torchrun(*BOTH, *flags(**LONG, out=tmp_path / "out"), cwd=tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    while len(steps_logged(tmp_path / "out")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=100)
    assert err.count(runs.STOPPED) == 1
    assert_saved(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("n, expected", [(10**9, "holds vae.pt of an earlier run"), (700_000, "checkpoint.pt: could not be saved (File too large)")])
def test_under_torchrun_all_stop_and_one_says_why(n, expected, tmp_path):
    """Where the first process finds that the folder is taken, and where the disk is full in the middle of training."""
    (tmp_path / "vae.pt").write_text("here" if n == 10**9 else "")
    with disk_of(n):
        process = torchrun(*BOTH, *flags(**LONG | dict(eval_every=2), out=tmp_path), cwd=tmp_path)
    _, err = process.communicate(timeout=100)
    ours = err.partition("ChildFailedError")[0]
    assert process.returncode == 1 and err.count("error: ") == 1 and expected in err, err
    assert ours.count("Traceback") == 1 and "RuntimeError" not in err and not list(tmp_path.glob("*.partial"))  # torchrun's own


# ---- What a run says ------------------------------------------------------------------------------------------------


def test_a_terminal_of_80_columns_keeps_lines_whole(small_run, capsys):
    """The log's and the table's; at the paper's sizes, too."""
    _, _, out, _ = small_run
    lines = [line for line in out.splitlines() if line.startswith(("iter", "held out", "seen", "% of n"))]
    assert len(lines) > 5 and max(map(len, lines)) <= 80 and any("text gap" in line for line in lines)
    log = Log.__new__(Log)
    vars(log).update(rank=0, peak=1e15, tokens=2**21, steps=0, seconds=0.0, flops=0.0, write=lambda *_: None)
    log.pace(12.0, 4e15)
    log.step(250_000, dict(lm=10.373, ddpm=0.123, norm=10.12, lr=3e-4, fill=0.95), ("lm", "ddpm"))
    assert len(said := capsys.readouterr().out.rstrip("\n")) <= 80 and said.endswith("12000 ms  MFU 33%")


def test_in_a_file_a_bar_is_a_line_now_and_then(small_run, monkeypatch, capsys):
    assert not set("\r\x1b") & set(small_run[3])
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Lines, "due", 30.0)
    for _ in tqdm(range(100), "train", file=Lines(), mininterval=0):
        now[0] += 1.0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all("train" in line and line.isprintable() for line in told)


def test_characters_that_the_sheets_font_lacks_are_named(capsys):
    say.cache_clear()
    images = [Image.new("RGB", (8, 8))] * 2
    contact_sheet(images, ["a red circle, top-left", "plain"])
    assert not capsys.readouterr().err
    contact_sheet(images, ["a red circle", "ein \u8d64 \u5186"])
    assert "boxes stand for characters that the sheet's font lacks: \u5186\u8d64" in capsys.readouterr().err


# ---- Files that ask for more than they hold -------------------------------------------------------------------------


@pytest.mark.parametrize("where, name, value", [
    ("config.model", "n_layers", 10**30), ("config.model", "n_layers", 10**6), ("config.model", "dim", 10**7), ("vae_config", "n_res", 10**30),
    ("vae_config", "channels", 10**7), ("config.extra", "unet_blocks", 10**30),
])  # fmt: skip
def test_sizes_beyond_the_files_own_are_refused_before_they_are_built(where, name, value, trained_vae, tmp_path):
    """A checkpoint, a VAE, and what --resume and --init_from read, come through the same door."""
    save(run := set_up(config_of(tmp_path, vae=trained_vae)))
    state = dict(load_checkpoint(run.checkpoint))
    if "unet" in name:
        state["config"]["extra"]["patch_encoder"] = "unet"
    part = state
    for key in where.split("."):
        part = part[key]
    part[name] = value
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=f"odd.pt: has only [0-9,]+ weights, too few for .*{name} {value:,}"):
        load(tmp_path / "odd.pt")
