"""The batches of a stream, their images loaded by worker processes ahead of need."""

import atexit
import itertools
import os
import signal
import sys
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader

from data import Batch, ImageSegment, Tokenizer, collate, document_length
from extras.runs import ENDS


class Loader:
    """The batches of a stream, in order, `batch_rows` rows at a time (default: all of a step).

    workers: processes that load images ahead of need; 0 = none. Batches are the same either way.
    state: where the stream stands after the batches handed out; to go on from there: `stream.load_state`,
    then `next`.
    skipped: counts the images that could not be read; without it they raise ValueError. OSError if a
    worker dies.
    pin: into pinned memory, from which batches go to a GPU without a wait of the host.
    """

    def __init__(self, stream, tokenizer, workers=0, batch_rows=None, skipped=None, pin=False):
        self.stream, self.skipped, self._ready = stream, skipped, deque()
        n = batch_rows or len(stream.my_rows)
        self.rows = [stream.my_rows[i : i + n] for i in range(0, len(stream.my_rows), n)]  # of each batch
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(workers, cores or 1)
        make = stream.documents if workers else stream.document
        self._batches, self._states = None, deque()  # the states after the batches that are on their way
        self._loader = DataLoader(
            BatchDataset(make, tokenizer, stream.seq_len, stream.n_patches, skipped is None),
            batch_size=None,
            sampler=pack(stream, self.rows, self._states),
            num_workers=workers,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),
            pin_memory=pin,
        )

    @property
    def state(self):
        """The stream's state after the last batch that was handed out."""
        return dict(self.stream.state) if self._batches is None else self._state

    def fetch(self):
        """Load one batch more, ahead of need: called while the GPU works. `state` stays as it is."""
        if self._batches is None:
            self._state = self.state
            self._batches = iter(self._loader)
            if self._loader.num_workers:
                atexit.register(end_workers, weakref.ref(self._batches))
        try:
            self._ready.append(next(self._batches))
        except (RuntimeError, EOFError, OSError) as error:
            died = f"a process that loads pictures has died ({error})"
            raise OSError(f"{died}; out of memory, perhaps: try fewer --workers") from None

    def __next__(self):
        """The next Batch."""
        if not self._ready:
            self.fetch()
        batch, errors = self._ready.popleft()
        if isinstance(batch, Exception):
            raise batch
        self._state = self._states.popleft()
        if self.skipped:
            self.skipped.count(len(batch["images"]) + len(errors), errors)
        return Batch(**batch)


def pack(stream, rows, states):
    """Yield each batch's document numbers, row by row, for ever; append the stream's state to `states`."""
    for some in itertools.cycle(rows):
        documents = [stream.pack_row(r) for r in some]
        states.append(dict(stream.state))
        yield documents


@dataclass
class BatchDataset:
    """What DataLoader's workers index: the documents' numbers, row by row -> their batch."""

    document: Callable
    tokenizer: Tokenizer
    seq_len: int
    n_patches: int
    strict: bool  # raise what is wrong with an image, rather than let another document stand in

    def __getitem__(self, rows):
        """Numbers of documents, row by row -> (fields of a Batch, reasons why images could not be read).

        A fatal error is returned, not raised: a worker would print a traceback.
        """
        errors = []
        try:
            rows = [[self.loaded(i, errors) for i in row] for row in rows]
            return vars(collate(rows, self.tokenizer, self.seq_len, self.n_patches)), errors  # can be pinned
        except (ValueError, OSError) as error:
            return error, []

    def loaded(self, i, errors, attempts=100):
        """Document i, its images in memory. If one is broken, another document stands in, no longer than it.

        errors: takes the reasons. Raises ValueError if `attempts` others are broken, too.
        """
        document = first = self.document(i)
        for attempt in range(1, attempts + 2):
            try:
                return [in_memory(part) if isinstance(part, ImageSegment) else part for part in document]
            except ValueError as error:
                if self.strict or attempt > attempts:
                    raise
                errors.append(str(error))
            document = self.document(i, attempt)
            if document_length(document, self.n_patches) > document_length(first, self.n_patches):
                document = [part if isinstance(part, ImageSegment) else [] for part in document]


def in_memory(picture):
    """The same ImageSegment, loaded. Raises ValueError if that cannot be done."""
    pixels = picture.load()
    return replace(picture, load=lambda: pixels)


def end_workers(batches):
    """At exit: say to the workers of an iterator (a weak reference) that no more is wanted.

    Python itself would send them SIGTERM then and wait, and `leave_signals` makes them outlast that.
    """
    if batches() is not None:
        batches()._shutdown_workers()


def leave_signals(worker):
    """In a worker: signals are for the training process, which saves first, and then ends its workers."""
    for one in ENDS:
        signal.signal(one, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # if it did not: to outlast it by so long
    # The thread that hands tensors over says nothing when nobody takes them any more.
    sys.excepthook = lambda *error: None
