"""The open blocks of a model: the latest holds it, one thread at a time uses it, after the last it is stock again."""

import contextlib
import sys
import threading

from kvlib.core import support

NAME = "kvlib"  # of the attention function and of the mask function
LOCK = threading.Lock()  # while blocks open and close


class Blocks:
    """What hangs on a model while blocks are open on it.

    Blocks of generators, of coroutines and of `ExitStack` need not close in the order in which they opened. Each may
    close at any time; a call is refused if it comes out of a block that is not the latest.

    Attributes:
        runs: the open ones, the latest last.
        generating: the thread in which `generate` runs, by its number; passing: that of the forward pass.
    """

    def __init__(self, model):
        self.model, self.runs = model, []
        self.generating: int | None = None
        self.passing: int | None = None
        self._pass = threading.Lock()  # during a forward pass: a block does not close before it has ended
        self._generate = model.__dict__.get("generate")
        self._decoder = support.decoder(model)
        self._implementation = self._decoder.config._attn_implementation

    @staticmethod
    def open(run) -> "Blocks":
        """Let the model follow `run`.

        Raises:
            RuntimeError: if another thread has a block open on it, or is using it.
        """
        here, model = threading.current_thread(), run.model
        with LOCK:
            blocks = model.__dict__.get("_kvlib_blocks") or Blocks(model)
            using = {blocks.generating, blocks.passing} - {None, here.ident}
            if using or any(other.thread is not here and other.thread.is_alive() for other in blocks.runs):
                raise RuntimeError("another thread has a block open on this model: give each thread a model of its own")
            if not blocks.runs:
                blocks._decoder.set_attn_implementation(NAME)
                model.__dict__["_kvlib_blocks"] = blocks
            run.thread, run.frame = here, opener(sys._getframe(2))
            for module in run.modules:
                module.__dict__.setdefault("_kvlib_runs", []).append(run)
            blocks.runs.append(run)
            model.__dict__["generate"] = run._generate
        return blocks

    def close(self, run) -> None:
        """Let the model follow the block that is now the latest, or be what it was before the first."""
        with contextlib.nullcontext() if self.passing == threading.get_ident() else self._pass, LOCK:
            run.thread = run.frame = None
            for module in run.modules:
                runs = module.__dict__["_kvlib_runs"]
                runs.remove(run)
                if not runs:
                    del module.__dict__["_kvlib_runs"]
            self.runs.remove(run)
            if self.runs:
                self.model.__dict__["generate"] = self.runs[-1]._generate
                return
            del self.model.__dict__["_kvlib_blocks"], self.model.__dict__["generate"]
            if self._generate is not None:
                self.model.__dict__["generate"] = self._generate
            self._decoder.set_attn_implementation(self._implementation)

    @contextlib.contextmanager
    def during_generate(self):
        """For the length of a call of `generate`."""
        me, before = threading.get_ident(), self.generating
        with LOCK:
            self._check_caller(me)
            self.generating = me
        try:
            yield
        finally:
            self.generating = before

    def begin_pass(self) -> None:
        """A forward pass begins.

        Raises:
            RuntimeError: if another thread is in the middle of one or of `generate`, or if the call comes out of a
                block that is not the latest.
        """
        me = threading.get_ident()
        if self.passing == me:
            return  # the latest was interrupted, or is still going on and reads something more
        with LOCK:
            self._check_caller(me)
            if not self._pass.acquire(blocking=False):
                raise RuntimeError(BUSY)
            self.passing = me

    def end_pass(self) -> None:
        """The forward pass of this thread has ended."""
        self.passing = None
        self._pass.release()

    def _check_caller(self, me: int) -> None:
        if self.generating not in (None, me):
            raise RuntimeError(BUSY)
        if len(self.runs) == 1:
            return
        # Generators and coroutines have no context of their own: only the frame that opened a block tells whose call
        # this is. If none of these frames is being executed, as in a thread, it counts as the latest block's.
        frame, frames = sys._getframe(1), [run.frame for run in self.runs]
        while frame is not None and frame not in frames:
            frame = frame.f_back
        if frame not in (None, frames[-1]):
            owner = self.runs[frames.index(frame)]
            raise RuntimeError(
                f"this call comes out of the block of {owner.method!r}, but that of {self.runs[-1].method!r} was "
                "opened later on the same model and is still open: close it first, or give each a model of its own"
            )


BUSY = "another thread is using this block: one forward pass at a time"


def opener(frame):
    """The frame whose block it is: not one of `contextlib`, which opens blocks for others."""
    while frame.f_back is not None and frame.f_code.co_filename == contextlib.__file__:
        frame = frame.f_back
    return frame
