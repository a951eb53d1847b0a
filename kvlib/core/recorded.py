"""A decoded token's work in one layer, recorded as a CUDA graph and replayed inside the model's own forward pass.

While tokens come one at a time, launching kernels is what takes the time, and a method that evicts launches a dozen
beside those of attention. They are recorded where they are the same on the same memory every time; from then on a layer
launches two things: a copy of its query, key and value, and the graph. That is so

- once a token goes for each that comes, if the method is known for it (`steady`): after a few steps (`replays`);
- if the method leaves decoded tokens alone and has evicted some of the prompt (`extends`): whenever the room for tokens
  to come was used up and made anew. Their number is then counted on the device, and attention reads what is filled. A
  cache that holds everything is left to SDPA, whose results are stock's to the bit.

What is recorded lives as long as the memory that it works on (`Part.still`). While one thread records, no other may
wait for the device as a whole or free a graph: both would fail. Nobody has asked for a graph here, so there is none
where such a thread may run (`alone`). `kvlib.core.capture` records whole steps, model and all, but has to be asked to.
"""

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from operator import is_

import torch

WARM = 3  # steps that have to find the same memory first: they compile kernels and bring numbers to the device
SPARE = 2**30  # bytes that a device should have left for graphs
DEVICES = {"cuda"}
STEADY: set[type] = set()
# By device and stream: the stream that records, for each new one brings workspaces, and the first graph. All others
# work in the memory of that one, one after the other. It is kept, for caches come and go, and what belonged to graphs
# that are gone is nobody else's until all spare memory is given back.
FIRST: dict[tuple, tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]] = {}


def steady(*methods: type) -> None:
    """Note methods of which, once a token goes for each that comes, a layer does the same for every token, waits for no
    device and looks at no other layer. Their python code is not run again once a layer is recorded.

    A subclass does not inherit it: what it adds may be of another kind.
    """
    STEADY.update(methods)


class Recorded:
    """`work(query, key, value)` as a graph, and copies of its inputs that the graph reads.

    Args:
        others: what holds the tensors that it reads beside the layer's own; while these are the same, so are those.
        first: no layer of the cache is recorded yet.
    """

    def __init__(self, work: Callable, inputs: tuple[torch.Tensor, ...], others: tuple, first: bool):
        self.others = others
        self.inputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        self.graph, self.output = record(lambda: work(*self.inputs), inputs[0].device, first)

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The output, which the next call overwrites."""
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.output

    def __reduce__(self):
        return type(None), ()  # a copy of the cache has memory of its own


def record(work: Callable, device: torch.device, first: bool) -> tuple:
    """A graph of the kernels that `work()` launches on a device, none of which runs, and what it returns.

    `torch.cuda.graph` would wait for the device first, collect garbage and give all spare memory back, for each layer.
    """
    if first and torch.cuda.mem_get_info(device)[0] < SPARE:
        torch.cuda.empty_cache()  # graphs cannot work in memory that torch keeps for others
    place = device, torch.cuda.current_stream(device).cuda_stream
    graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
    stream, earlier = FIRST[place] if place in FIRST else (torch.cuda.Stream(device), None)
    stream.wait_stream(torch.cuda.current_stream(device))
    gc.disable()  # a graph among the garbage must not be freed now
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            # daemons may ask for memory meanwhile, as those do that bring data to the device
            graph.capture_begin(*([earlier.pool()] if earlier else []), capture_error_mode="thread_local")
            try:
                output = work()
            finally:
                graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    FIRST.setdefault(place, (stream, graph))
    return graph, output


def alone() -> bool:
    """Are all other threads daemons? The main thread is none."""
    here = threading.current_thread()
    return all(thread is here or thread.daemon for thread in threading.enumerate())


def replays(run, layer, device: torch.device, dropout: float) -> bool:
    """Is the work of a decoded token in this layer what it was in the steps before?"""
    tail = layer.tail
    if not (tail.vacant and tail.still >= WARM and tail.uniform and layer.body is None) or tail.static or dropout:
        return False
    return on_device(run, device) and (tail.recorded is not None or alone())


def extends(run, layer, device: torch.device, dropout: float) -> bool:
    """Does a token that the method leaves alone go where it is recorded, or will be as the next room is made?

    The layer is uniform, and has room that was recorded or none. It has to hold less than all tokens before this one.
    """
    tail, step = layer.tail, run.step
    if dropout or not tail.holds_less(step.tokens - 1, step.longest - 1):
        return False
    return on_device(run, device) and (tail.recorded is not None or alone())


def on_device(run, device: torch.device) -> bool:
    """Can what is done on it be recorded?"""
    return device.type in DEVICES and device == run.cache.ends.device and not torch.is_grad_enabled()


def replay(run, layer, work: Callable, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`work(*inputs)`, recorded if it was not yet. The layer's counts are left as they are."""
    recorded = layer.tail.recorded
    if recorded is None or not all(map(is_, watched(run), recorded.others)):
        note(run, layer, work, inputs)
    return layer.tail.recorded(inputs)


def extend(run, layer, work: Callable, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`work(*inputs)`, which appends a token; with new room it is done step by step, and recorded for the next one."""
    tail = layer.tail
    if full := tail.outgrown:
        tail.grow()
    tail.static = True
    try:
        if full:
            output = work(*inputs)
            note(run, layer, work, inputs)
        else:
            output = replay(run, layer, work, inputs)
            tail.count(1)
    finally:
        tail.static = False
    return output


def watched(run) -> tuple:
    """What holds tensors that a graph reads, and is another object when these are."""
    return run.cache.ends, run.cache.notes, run.prepared


def note(run, layer, work: Callable, inputs: tuple[torch.Tensor, ...]) -> None:
    """Record what is done with a token, without doing it."""
    step, tail = run.step, layer.tail
    # a step of its own, so that the graph does not read what another layer has worked out in this one
    run.step = replace(step, shared=None, sums={}, starts={}, listed={}, view=None, copies={})
    before = tail.each
    try:
        first = not any(other.tail.recorded for other in run.cache.layers)
        tail.recorded = Recorded(work, inputs, watched(run), first)
    finally:
        run.step = step
        tail.count(before - tail.each)
