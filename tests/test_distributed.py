"""train.py in several processes: real torchrun jobs (gloo, CPU), against the same run in one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, flags

import train
from extras.runs import load_checkpoint
from train import parse, save, set_up, train_step, validate

RANKS = Path(__file__).parent / "ranks.py"
STEPS, HELD_OUT = 3, 30
UNET = dict(patch_encoder="unet", unet_channels=64, unet_blocks=1)
DISCRETE = dict(config="chameleon", codebook=32, micro_rows=1, caption_first=0.5)


def torchrun(*args, cwd, timeout=300):
    """The process `torchrun args`, with one thread for each of its processes."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def options(out, vae, **change):
    """A run whose four rows differ in how many text targets and images they hold; float32, so that sums compare."""
    return flags(**TINY | dict(out=out, vae=vae, rows=4, eval_documents=HELD_OUT, max_steps=20, caption_first=0.3, precision="fp32", optimizer="adamw", image_first_max_t=0, lr=1e-4, warmup=1) | change)


@pytest.fixture(scope="module")
def one_process(trained_vae, tmp_path_factory):
    """The reference: one process, one micro-batch -> (run after STEPS steps and saved, what the steps logged)."""
    run = set_up(*parse(options(tmp_path_factory.mktemp("one") / "out", trained_vae)))
    values = [train_step(run) for _ in range(STEPS)]
    save(run)
    return run, values


@pytest.fixture(scope="module")
def two_processes(one_process, trained_vae, tmp_path_factory):
    """All the jobs of two processes, in one start -> their folders by name."""
    folder = tmp_path_factory.mktemp("two")
    one, _ = one_process
    (folder / "resumed").mkdir()
    (folder / "resumed/checkpoint.pt").write_bytes(one.checkpoint.read_bytes())
    (folder / "resumed/vae.pt").write_bytes(Path(trained_vae).read_bytes())

    def job(name, *more, steps=STEPS, **change):
        return dict(steps=steps, options=[*options(folder / name, trained_vae, **dict(micro_rows=1) | change), *more])

    jobs = [job("hsdp", "--fsdp", "--shard", "1"), job("checkpointed", "--fsdp", "--checkpoint_activations"),
            job("bf16_ddp", precision="bf16"), job("bf16_fsdp", "--fsdp", precision="bf16"),
            *(job(f"{how}_{name}", *more, *again, steps=steps, workers=workers) for how, workers, more in (("ddp", 1, []), ("fsdp", 0, ["--fsdp"]))
              for name, steps, again in (("straight", 4, []), ("stopped", 2, []), ("stopped", 2, ["--resume"]))),
            dict(steps=0, options=options(folder / "unshared_RANK", ""), refused=str(folder / "refused_")),
            dict(steps=STEPS, options=options(folder / "ddp", trained_vae, micro_rows=1)),
            dict(steps=STEPS, options=options(folder / "ddp_at_once", trained_vae, micro_rows=2)),
            dict(steps=STEPS, options=options(folder / "muon", trained_vae, micro_rows=1, optimizer="muon")),
            dict(steps=STEPS, options=[*options(folder / "fsdp", trained_vae, micro_rows=1), "--fsdp"]),
            *(dict(steps=STEPS, options=[*options(folder / f"unet_{how}", trained_vae, micro_rows=1, **UNET), *more]) for how, more in (("ddp", []), ("fsdp", ["--fsdp"]))),
            dict(steps=STEPS, options=options(folder / "discrete", "", **DISCRETE)),
            dict(steps=2, options=[*options(folder / "resumed", trained_vae), "--fsdp", "--resume"])]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    process = torchrun("--standalone", "--nproc_per_node=2", RANKS, folder / "jobs.json", cwd=folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]
    return folder


def values_of(folder):
    return json.loads((folder / "values.json").read_text())


def assert_close(found, expected, rtol=1e-4):
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=rtol), (a, b)


def apart(found, expected):
    """How far two tensors are apart, as a share of their length."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def assert_same_state(folder, run):
    """The checkpoint in a folder holds a run's weights, averages, and optimiser's moments, which are the gradients so far.
    (Element by element the weights are further apart: Adam's first steps are the signs of gradients, some of them near 0.)"""
    state = load_checkpoint(folder / "checkpoint.pt")
    save(run)
    expected = load_checkpoint(run.checkpoint)
    assert state["step"] == expected["step"] and state["stream"] == expected["stream"]
    for name, value in expected["model"].items():
        assert apart(state["model"][name], value) < 1e-3 and apart(state["ema"][name], expected["ema"][name]) < 1e-3, name
        moments, found = expected["optimizer"]["state"][name], state["optimizer"]["state"][name]
        assert apart(found["exp_avg"], moments["exp_avg"]) < 1e-2 and apart(found["exp_avg_sq"], moments["exp_avg_sq"]) < 1e-2, name


def assert_equal_states(found, expected):
    """Two checkpoints hold the very same weights, averages, moments and place in the data."""
    assert found["step"] == expected["step"] and found["stream"] == expected["stream"]
    for name, value in expected["model"].items():
        moments = expected["optimizer"]["state"][name]
        assert torch.equal(found["model"][name], value) and torch.equal(found["ema"][name], expected["ema"][name]), name
        assert all(torch.equal(found["optimizer"]["state"][name][key], moments[key]) for key in moments), name


def test_the_rows_differ_in_what_the_means_are_over(one_process, trained_vae, tmp_path):
    """Or means of the ranks' means would pass the tests below."""
    run = set_up(*parse(options(tmp_path / "out", trained_vae, micro_rows=1)))
    targets, images = zip(*(run.objective.counts(batch) for batch, _ in [(next(run.loader), rows) for rows in run.loader.rows]))
    assert len(set(targets)) > 1 and len(set(images)) > 1


@pytest.mark.parametrize("name", ["ddp", "ddp_at_once", "fsdp", "hsdp", "checkpointed"])
def test_two_processes_equal_one(name, one_process, two_processes):
    """Losses, gradient norms, weights and moments, with and without gradient accumulation."""
    run, values = one_process
    found = values_of(two_processes / name)
    assert found["ranks"] == 2
    assert_close(found["steps"], values)
    assert_same_state(two_processes / name, run)
    expected = validate(run)
    assert found["validation"]["val_lm"] == pytest.approx(expected["val_lm"], rel=1e-4)
    assert found["validation"]["val_ddpm"] == pytest.approx(expected["val_ddpm"], rel=1e-4)


def test_bf16_too(two_processes, trained_vae, tmp_path):
    """autocast, and FSDP2's bfloat16 parameters, beside one process; the weights that are saved, of which FSDP2 makes them, are float32."""
    run = set_up(*parse(options(tmp_path / "out", trained_vae, precision="bf16")))
    values = [train_step(run) for _ in range(STEPS)]
    for how in ("bf16_ddp", "bf16_fsdp"):
        assert_close(values_of(two_processes / how)["steps"], values, rtol=2e-2)
        state = load_checkpoint(two_processes / how / "checkpoint.pt")
        for name, value in run.model.state_dict().items():
            assert state["model"][name].dtype == torch.float32 and apart(state["model"][name], value) < 1e-2, name


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_resume_bit_for_bit(how, two_processes):
    straight, stopped = (load_checkpoint(two_processes / f"{how}_{name}/checkpoint.pt") for name in ("straight", "stopped"))
    assert values_of(two_processes / f"{how}_straight")["steps"][2:] == values_of(two_processes / f"{how}_stopped")["steps"]
    assert_equal_states(stopped, straight)


def test_an_out_that_is_not_shared_is_refused(two_processes):
    """In every process, rather than that each trains a VAE of its own."""
    errors = [(two_processes / f"refused_{rank}").read_text() for rank in range(2)]
    assert all("1 of the 2 processes can see it; --out must be a folder that all nodes share" in error for error in errors)


def test_processes_validate_in_step(two_processes):
    """They take equally many validation batches, though each by itself would take another number: FSDP2 gathers weights in each."""
    by_process = values_of(two_processes / "fsdp")["held_out"]
    assert len({len(images) for images in by_process}) == 1
    enough = [[2 * sum(images[: n + 1]) >= HELD_OUT for n in range(len(images))] + [True] for images in by_process]
    assert len({each.index(True) for each in enough}) == 2, by_process


def test_gradients_travel_once_a_step(two_processes):
    """In the last micro-batch only: as often with two micro-batches a step as with one."""
    assert values_of(two_processes / "ddp")["travelled"] == values_of(two_processes / "ddp_at_once")["travelled"] == STEPS


def test_micro_batches_equal_one_batch(one_process, trained_vae, tmp_path):
    run, values = one_process
    accumulated = set_up(*parse(options(tmp_path / "out", trained_vae, micro_rows=1)))
    assert_close([train_step(accumulated) for _ in range(STEPS)], values)


def test_muon_too(two_processes, trained_vae, tmp_path):
    run = set_up(*parse(options(tmp_path / "out", trained_vae, optimizer="muon")))
    assert_close(values_of(two_processes / "muon")["steps"], [train_step(run) for _ in range(STEPS)])
    state = load_checkpoint(two_processes / "muon/checkpoint.pt")["optimizer"]["state"]
    assert "momentum_buffer" in state["blocks.0.mlp.down.weight"] and "exp_avg" in state["head.weight"]


def test_a_unet_too(two_processes, trained_vae, tmp_path):
    """Copied or shared; the weights, in FSDP2, belong to the root, whose forward calls both halves."""
    run = set_up(*parse(options(tmp_path / "out", trained_vae, **UNET)))
    values = [train_step(run) for _ in range(STEPS)]
    for how in ("ddp", "fsdp"):
        assert_close(values_of(two_processes / f"unet_{how}")["steps"], values)
        assert_same_state(two_processes / f"unet_{how}", run)


def test_discrete_images_too(two_processes, tmp_path):
    """Where the mean is over all the targets of the step, those in images included."""
    run = set_up(*parse(options(tmp_path / "out", two_processes / "discrete/vae.pt", **DISCRETE | dict(micro_rows=2))))  # validates on as many rows as two processes with one
    found = values_of(two_processes / "discrete")
    assert_close(found["steps"], [train_step(run) for _ in range(STEPS)])
    assert found["validation"] == pytest.approx(validate(run), rel=1e-4) and found["validation"]["val_codes"] > 0


def test_checkpoints_move_between_numbers_of_processes(one_process, two_processes, trained_vae, tmp_path):
    """One process's checkpoint goes on in two that share the weights, and two processes' in one: as if nothing had happened."""
    straight = set_up(*parse(options(tmp_path / "straight", trained_vae)))
    values = [train_step(straight) for _ in range(STEPS + 2)]
    assert_close(values_of(two_processes / "resumed")["steps"], values[STEPS:])
    assert_same_state(two_processes / "resumed", straight)

    on_one = set_up(parse(options(two_processes / "ddp", trained_vae))[0], resume=True)
    assert on_one.step == STEPS
    assert_close([train_step(on_one) for _ in range(2)], values[STEPS:])


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--fsdp", "--shard", "1"]], ids=["ddp", "hsdp"])
def test_two_nodes_of_one_process_each(more, trained_vae, tmp_path):
    """The README's command for two nodes: two agents that meet on this machine; a whole run, evaluation included."""
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test", "--local_addr=127.0.0.1"]
    agents = [torchrun(*rendezvous, ROOT / "train.py", *options(tmp_path / "out", trained_vae, max_steps=4), *more, cwd=tmp_path) for _ in range(2)]
    ends = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    out = "".join(out for out, _ in ends)
    assert out.count("held out, prompts") == 1 and "on 2 x cpu" in out  # the first process alone speaks
    assert load_checkpoint(tmp_path / "out/checkpoint.pt")["step"] == 4


@pytest.mark.slow
def test_ctrl_c_under_torchrun(trained_vae, tmp_path):
    """torchrun passes it on, both processes save, and --resume ends where a run that was left alone does."""

    def start(name, *more):
        return torchrun("--standalone", "--nproc_per_node=2", ROOT / "train.py", *options(tmp_path / name, trained_vae, max_steps=60, log_every=1), *more, cwd=tmp_path)

    stopped, log = start("stopped"), tmp_path / "stopped/log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=300)
    assert stopped.returncode != 0 and err.count("the same command with --resume") == 1, err
    assert 3 <= load_checkpoint(tmp_path / "stopped/checkpoint.pt")["step"] < 60
    for process in (start("stopped", "--resume"), start("straight")):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert_equal_states(*(load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("stopped", "straight")))


def test_rows_that_the_processes_cannot_share(trained_vae, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="multiple of the 1 processes times micro_rows, 3"):
        set_up(*parse(options(tmp_path / "out", trained_vae, micro_rows=3)))
    monkeypatch.setattr(train, "join", lambda name: (0, 3, torch.device("cpu")))
    with pytest.raises(ValueError, match="multiple of the 3 processes$"):
        set_up(*parse(options(tmp_path / "out", trained_vae)))
