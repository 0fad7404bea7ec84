"""What a run reads and writes. What cannot be read is a ValueError, what cannot be written an OSError."""

import contextlib
import json
import os
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

STOPPED = "stopped. Training that had begun was saved: the same command with --resume goes on from there"


def reason(error):
    """An error in a few words, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:100].removesuffix(":")


@contextlib.contextmanager
def opening(path, what):
    """Whatever goes wrong inside becomes a ValueError that names the file. what: "a tar", for example."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or reason(error)})") from None
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
    except Exception as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()
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
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def load_weights(module, weights, where):
    """Put a state dict into a module. Raises ValueError that names `where` if the two differ in sizes."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        wrong = "the weights do not have the sizes of its configuration"
        raise ValueError(f"{where}: {wrong} ({str(error).splitlines()[-1].strip()})") from None


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


def newest_checkpoint():
    """The checkpoint under out/ that was written last. Raises ValueError if there is none."""
    found = sorted(Path("out").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError("no checkpoint under out/; train one first: python train.py --config small")
    print(f"with {found[-1]}, the newest under out/", file=sys.stderr)
    return found[-1]


def check_folder(path, option):
    """Raises ValueError, naming the option, if a folder cannot be written to: ask before long work."""
    path = Path(path)
    try:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
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


def keep_old(folder, names):
    """Rename what an earlier run left in the folder under these names, and say so."""
    for before in (Path(folder) / name for name in names):
        if before.exists() and before.stat().st_size:
            kept = before.replace(before.with_stem(f"{before.stem}.old"))
            print(f"{before} of an earlier run is now {kept.name}; --resume would have gone on with it")


class Interrupt:
    """While it is entered, Ctrl-C (or SIGTERM) sets `asked`; a second one stops the program at once."""

    def __enter__(self):
        self.asked = False
        self.before = {one: signal.signal(one, self._ask) for one in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step, then saving; once more stops at once", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for one, handler in self.before.items():
            signal.signal(one, handler)
