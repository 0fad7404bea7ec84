"""bench.py runs from end to end and prints what its tables promise, on works too small to say anything about speed."""

import bench
import pytest
import torch


def lines(capsys, *args):
    bench.main(list(map(str, args)))
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_training_beside_a_bare_llama(capsys):
    out = lines(capsys, "training", "--only", "small", "--rounds", 1)
    rows = {line[:28].strip(): line[28:].split() for line in out if line.startswith(("ours", "bare Llama"))}
    assert set(rows) == {"ours, fp32", "ours, bf16", "bare Llama, fp32", "bare Llama, bf16"}
    assert all(float(cells[1].replace(",", "")) > 0 for cells in rows.values()) and rows["bare Llama, fp32"][3] == rows["bare Llama, bf16"][3] == "1.00"


@pytest.mark.slow
def test_sizes_by_switch(capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)  # which would take a minute
    out = lines(capsys, "sizes", "--only", "tiny", "--rounds", 1, "--rows", 1, "--seq_len", 256, "--images", 4, "--device", "cpu")
    switches = [line.split()[1:5] for line in out if line.split()[0] == "tiny"]
    assert switches == [["sdpa", "on", "bf16", "False"], ["sdpa", "off", "bf16", "False"], ["sdpa", "off", "fp32", "False"]]  # no FlexAttention on a CPU


@pytest.mark.slow
def test_attention_beside_a_causal_one(capsys):
    out = lines(capsys, "attention", "--rounds", 1, "--device", "cpu")
    assert [line[:44].strip() for line in out[1:]] == ["causal, SDPA", "hybrid mask, one document, SDPA", "hybrid mask, packed, SDPA"]
    assert out[1].endswith(" 1.00 x causal")


@pytest.mark.slow
def test_ranks_counts_processes(capsys):
    out = lines(capsys, "ranks", "--ranks", 2)
    assert [line.split()[0] for line in out] == ["processes", "2"] and float(out[1].split()[1].replace(",", "")) > 0
