"""What a run says: lines of at most 80 columns, JSON lines in a file, and the same in Weights & Biases."""

import json
import math
from dataclasses import asdict

from extras import gap, reference
from extras.costs import peak_flops
from extras.machine import import_wandb, machine, say
from extras.parallel import first
from extras.runs import reason


class Log:
    """The log of a run, kept by its first process: log.jsonl in its folder, and --wandb's project.

    state: the checkpoint that training goes on from, or None; what a killed run logged after it is cut off.
    """

    def __init__(self, run, state):
        config, self.rank, self.file, self.wandb = run.config, run.rank, None, None
        self.config = config
        self.tokens = config.rows * config.data.seq_len  # positions of a step
        self.peak = (machine(config, run.device)[0] and peak_flops(run.device) or 0) * run.ranks
        self.steps, self.seconds, self.flops = 0, 0.0, 0.0  # since the last line
        self.found = (state or {}).get("found", {})  # of the last validation
        if run.rank:
            return
        self.file = (run.out / "log.jsonl").open("ab", buffering=0)
        self.file.truncate(min(self.file.tell(), state.get("log", math.inf) if state else 0))
        if config.wandb:
            again = dict(id=state and state.get("wandb"), resume="allow")
            self.wandb = import_wandb().init(
                project=config.wandb, config=asdict(config), dir=run.out, **again
            )

    def begin(self, run):
        """Say what is trained, and where."""
        where = f"{run.ranks} x {run.device.type}" if run.ranks > 1 else str(run.device)
        parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
        of_peak = f"; MFU is of {self.peak / run.ranks / 1e12:.0f} TFLOP/s, dense bf16" if self.peak else ""
        sizes = f"{parameters:.2f} M parameters, {run.config.max_steps:,} steps, on {where}"
        say(run, f"2. the transformer ({sizes}){of_peak}")

    def pace(self, seconds, flops):
        """Note what a step took."""
        self.steps, self.seconds, self.flops = self.steps + 1, self.seconds + seconds, self.flops + flops

    def step(self, step, values, names):
        """Log a step, with the pace since the last line, and say some of it. names: of its losses."""
        values |= dict(flops=self.flops / self.steps, ms=1000 * self.seconds / self.steps)
        values |= dict(tokens_per_s=self.steps * self.tokens / self.seconds)
        texts = [f"iter {step:6}", *(f"{name} {values[name]:.3f}" for name in names)]
        texts += [f"norm {values['norm']:.2f}", f"lr {values['lr']:.1e}", f"{values['ms']:.0f} ms"]
        if self.peak:
            values["mfu"] = self.flops / self.seconds / self.peak
            texts.append(f"MFU {values['mfu']:.0%}")
        self.steps, self.seconds, self.flops = 0, 0.0, 0.0
        self.write(step, values)
        say(self, "  ".join(texts))

    def validation(self, step, found):
        """Log the losses of a validation: {name: mean or None}."""
        self.write(step, found)
        self.found = found
        texts = {name.removeprefix("val_"): "-" if v is None else f"{v:.3f}" for name, v in found.items()}
        quarters = " ".join(texts[name] for name in texts if name.startswith("ddpm_q"))
        means = [f"{name} {text}" for name, text in texts.items() if "_q" not in name and "gap" not in name]
        means += [f"by t {quarters}"] if quarters else []
        for part in filter(None, (means, gap.said(found), reference.verdict(self.config, step, found))):
            say(self, "held out: " + "  ".join(part))

    def write(self, step, values):
        """One line: {name: number} of a step. Raises OSError, in all processes, if the disk is full."""
        first(lambda: self._write(json.dumps({"step": step, **values}).encode() + b"\n"))
        if self.wandb:
            self.wandb.log(values, step=step)

    def _write(self, line):
        try:
            self.file.write(line)
        except OSError as error:
            raise OSError(f"{self.file.name}: could not be written to ({reason(error)})") from None

    def state(self):
        """What a checkpoint keeps: where the file ends, the last validation, the run's name elsewhere."""
        return {"log": self.file.tell(), "found": self.found, "wandb": self.wandb and self.wandb.id}
