"""What a run reads and writes: its files, its folder, and how it ends.

What cannot be read is a ValueError, what cannot be written an OSError.
"""

import contextlib
import functools
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path


def end_in_a_line(kind, error, trace):
    """What nobody catches is printed as ever, but Ctrl-C, while a program still starts, in one line."""
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, trace)
    print("\nstopped", file=sys.stderr)
    sys.exit(130)


sys.excepthook = end_in_a_line
# OpenMP threads that spin for long collapse beside another program; those that never spin are slow.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported

import torch  # noqa: E402, it takes seconds
from tqdm import tqdm  # noqa: E402


class Lines:
    """Where stderr is no terminal: a bar's text as a line every half minute, without control characters."""

    due = time.monotonic() + 30

    def write(self, text):
        """Take what a bar writes. A state of it begins with a carriage return."""
        if text.strip() and text.startswith("\r") and time.monotonic() > self.due:
            print(text.strip(), file=sys.stderr, flush=True)
            self.due = time.monotonic() + 30

    def flush(self):
        """Files have it."""


if not (sys.stderr and sys.stderr.isatty()):
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, file=Lines())

STOPPED = "stopped. Training that had begun was saved: the same command with --resume goes on from there"
FINISHING = "\nfinishing what is begun, then saving; once more stops at once\n"
AT_ONCE = "\nstopped at once, without saving: --resume goes on from what was saved before\n"
WORK = ("checkpoint.pt", "log.jsonl", "scores.json", "samples_*.png")  # of a run, beside its vae.pt
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def reason(error):
    """An error in a few words, on one line: the system's words, where it was the system's."""
    cause = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())[:100].removesuffix(":")


@contextlib.contextmanager
def opening(path, what):
    """Whatever goes wrong inside becomes a ValueError that names the file. what: "a tar", for example."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({reason(error)})") from None
    except Exception as error:  # a broken file makes libraries raise almost anything
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: is not {what} ({reason(error)})") from None


@contextlib.contextmanager
def written(path):
    """A file to write to, which takes the place of `path` when it is whole. Raises OSError if that fails."""
    partial = Path(f"{path}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if not isinstance(error, (OSError, RuntimeError)):  # torch reports a full disk as RuntimeError
            raise
        saved = f"could not be saved ({reason(error)}); what was saved there before is intact"
        raise OSError(f"{path}: {saved}") from error


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values."""
    with written(path) as file:
        torch.save(state, file)


def load_checkpoint(path):
    """Read a checkpoint onto the CPU: tensors and plain values only, code in it is refused."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such checkpoint")
    with opening(path, "a checkpoint of tensors and plain values, or is truncated"):
        # Mapped, so that the processes of a machine share one copy.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(state, dict):
        check_sizes(state, path)
    return state


def check_sizes(state, where):
    """Raises ValueError if a checkpoint's configuration asks for more numbers than its weights are.

    To build such a model might take for ever. What else is wrong with it is found later.
    """
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        model, extra = state["config"]["model"], state["config"]["extra"]
        parts = [("vae", state["vae_config"], ("n_res", "channels")), ("ema", model, ("n_layers", "dim"))]
        parts += [("ema", extra, ("unet_blocks", "unet_channels"))] * (extra["patch_encoder"] == "unet")
        for part, config, names in parts:
            deep, wide = (config[name] for name in names)
            there = sum(weight.numel() for weight in state[part].values())
            if type(deep) is type(wide) is int and max(1, deep) * wide * wide > there:
                asked = f"{names[0]} {deep:,} and {names[1]} {wide:,}"
                raise ValueError(f"{where}: has only {there:,} weights, too few for {asked}")


def load_weights(module, weights, where):
    """Put a state dict into a module. Raises ValueError that names `where` if the two differ in sizes."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        wrong = "the weights do not have the sizes of its configuration"
        raise ValueError(f"{where}: {wrong} ({str(error).splitlines()[-1].strip()})") from None
    for name, value in module.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{where}: {name} has values that are not finite")


def read_json(path):
    """A JSON file that holds an object -> dict."""
    with opening(path, "JSON"):
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return found


def write_json(path, found):
    """Write plain values as a JSON file."""
    with written(path) as file:
        file.write(json.dumps(found, indent=1).encode())


IN_THE_BOX = Path(__file__).resolve().parent.parent / "assets/small.safetensors"


def newest_checkpoint():
    """The checkpoint under out/ that was written last; before there is one, the weights that come along."""
    found = sorted(Path("out").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if found:
        print(f"with {found[-1]}, the newest under out/", file=sys.stderr)
        return found[-1]
    print("with assets/small.safetensors, for no run is under out/ yet", file=sys.stderr)
    return IN_THE_BOX


def check_folder(path, option):
    """Raises ValueError, naming the option, if a folder cannot be written to: ask before long work."""
    path = Path(path)
    new = [folder for folder in (path, *path.absolute().parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        for folder in new:  # until there is something to write
            folder.rmdir()
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{option}: {path} is not a folder") from None
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be written to ({error.strerror})") from None


def check_file(path, option):
    """Raises ValueError, naming the option, if a file cannot be written."""
    check_folder(Path(path).parent, f"{option} {path}")
    if Path(path).is_dir():
        raise ValueError(f"{option} {path}: is a folder; name a file")


HELD = []  # the locks of this process, which end with it, however it ends


def lock(folder):
    """Make a folder this process's own. Raises ValueError, naming the other, if another process has it."""
    file = open(Path(folder) / ".lock", "ab+", buffering=0)
    try:
        from fcntl import LOCK_EX, LOCK_NB, lockf  # not on Windows

        lockf(file, LOCK_EX | LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().decode() or "another process"
        raise ValueError(f"--out {folder}: {owner} is at work there; name another folder") from None
    except (ImportError, OSError):  # a file system without locks
        pass
    HELD.append(file)  # for good: to close any file on it would end the lock


def claim(folder, work, resume):
    """Make the folder of a run this process's own until it ends, and clear what a killed one left half.

    work: patterns of the files that will be written. Raises ValueError if the folder cannot be written to,
    if another process has it or, without `resume`, if such files are there: none is ever written over.
    """
    folder = Path(folder)
    check_folder(folder, "--out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be written to ({reason(error)})") from None
    there = sorted(path.name for name in work for path in folder.glob(name) if path.stat().st_size)
    if there and not resume:
        held = f"holds {', '.join(there[:4])} of an earlier run"
        raise ValueError(f"--out {folder}: {held}; go on with it by --resume, or name another --out")
    for path in folder.glob("*.partial"):
        path.unlink()
    shutil.rmtree(folder / ".rehearsal", ignore_errors=True)


class Interrupt:
    """While it is entered, Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 set `asked`; a later one stops at once.

    Who leaves it without having looked is stopped then. What is ignored, as SIGHUP under nohup, stays so;
    but torchrun does not heed nohup itself, and passes SIGHUP on.
    """

    def __enter__(self):
        self.asked = False
        heeded = lambda one: one == signal.SIGINT or signal.getsignal(one) != signal.SIG_IGN
        ends = [one for one in ENDS if heeded(one) or "RANK" in os.environ]
        self.before = {one: signal.signal(one, self._ask) for one in ends}
        return self

    def _ask(self, number, _):
        if self.asked and time.monotonic() < self.since + 1:
            return  # a shell and torchrun pass on what came already
        with contextlib.suppress(OSError):  # a print might be what was interrupted
            os.write(2, (AT_ONCE if self.asked else FINISHING).encode())
        if self.asked:
            sys.exit(130)
        self.asked, self.since = True, time.monotonic()
        for bar in tqdm._instances if number != signal.SIGINT else ():
            bar.disable = True  # the terminal may be gone

    def __exit__(self, kind, *_):
        for one, handler in self.before.items():
            signal.signal(one, handler)
        if self.asked and kind is None:
            outer = self.before[signal.SIGINT]
            (outer if callable(outer) else signal.default_int_handler)(signal.SIGINT, None)
