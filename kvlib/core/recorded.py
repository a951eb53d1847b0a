"""A decoded token's work in one layer, recorded as a CUDA graph and replayed inside the model's own forward pass.

While tokens come one at a time, launching kernels is what takes the time, and a method that evicts launches a dozen
beside those of attention. Once a token goes for each that comes they are the same kernels on the same memory every
time, if the method is known for it (`steady`). So after a few steps they are recorded, and from then on a layer
launches two things: a copy of its query, key and value, and the graph.

What is recorded lives as long as the memory that it works on (`Part.still`). `kvlib.core.capture` records whole steps,
model and all, but it has to be asked to.
"""

from collections.abc import Callable
from dataclasses import replace
from operator import is_

import torch

WARM = 3  # steps that have to find the same memory first: they compile kernels and bring numbers to the device
DEVICES = {"cuda"}
STEADY: set[type] = set()


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
    """

    def __init__(self, work: Callable, inputs: tuple[torch.Tensor, ...], others: tuple, pool):
        self.others = others
        self.inputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        self.graph, self.output = record(lambda: work(*self.inputs), pool, inputs[0].device)

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The output, which the next call overwrites."""
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.output

    def __reduce__(self):
        return type(None), ()  # a copy of the cache has memory of its own


def record(work: Callable, pool, device: torch.device) -> tuple:
    """A graph of the kernels that `work()` launches on a device, none of which runs, and what it returns."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)  # the one that torch takes by itself is the same for all devices
    mode = "thread_local"  # nobody has asked for a graph: what other threads do meanwhile must not fail
    with torch.cuda.device(device), torch.cuda.graph(graph, pool, stream, capture_error_mode=mode):
        output = work()
    return graph, output


def pool(cache, device: torch.device):
    """Memory in which graphs of other layers work already, one after the other; None: there are none."""
    there = (layer.tail.recorded for layer in cache.layers if layer.tail.positions.device == device)
    return next((recorded.graph.pool() for recorded in there if recorded), None)


def replays(run, layer, device: torch.device) -> bool:
    """Is the work of a decoded token in this layer what it was in the steps before?"""
    tail = layer.tail
    if not (tail.vacant and tail.still >= WARM and tail.uniform and layer.body is None) or tail.static:
        return False
    return device.type in DEVICES and device == run.cache.ends.device and not torch.is_grad_enabled()


def replay(run, layer, work: Callable, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`work(*inputs)`, recorded if it was not yet. `work` leaves the layer's counts as it finds them."""
    recorded, others = layer.tail.recorded, (run.cache.ends, run.cache.notes, run.prepared)
    if recorded is None or not all(map(is_, others, recorded.others)):
        step = run.step  # of its own, so that the graph does not read what another layer has worked out in this step
        run.step = replace(step, shared={}, sums={}, starts={}, listed={}, view=None)
        try:
            recorded = layer.tail.recorded = Recorded(work, inputs, others, pool(run.cache, inputs[0].device))
        finally:
            run.step = step
    return recorded(inputs)
