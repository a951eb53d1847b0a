"""Decoding with static shapes: one step, captured as a CUDA graph and replayed.

In eager mode a step attends to exactly what is stored, and the CPU knows how much that is. Here the device counts: the
next token is written to a slot whose number lies on the device, shapes are those of all slots there is memory for, and
those that are empty are hidden by lengths on the device or by positions of -1. So every step is the same sequence of
kernels, and launching them costs nothing. Without a GPU the same steps run one by one, which is how they are tested.
"""

import torch
from torch.overrides import TorchFunctionMode


class CapturedStep:
    """`with run.capture(room) as step:` inside an open block, after the prompt; `step(ids)` decodes a token per row.

    A method that evicts while decoding is run step by step until it has reached its budget. From then on one token goes
    for each that comes. Whatever the method does in a step must not wait for the device, as is the rule anyway.

    Args:
        room: the most tokens that will be decoded here.

    Raises:
        ValueError: if a layer has more than one part, or its slots are to stay in text order while tokens are evicted;
            if layers lie on several devices.
        RuntimeError: if more than `room` tokens are asked for.
    """

    def __init__(self, run, room: int):
        self.run, self.cache, self.room = run, run._filled(), room
        self.graph = self.logits = None
        self._warm = 0
        self._ids = self.cache.ends.clone()  # (batch, 1) on the device
        if run.method.text_order and self._evicts:
            raise ValueError(f"{run.method!r} moves what is stored after every token, to keep it in text order")
        for layer in self.cache.layers:
            if layer.body is not None:
                raise ValueError(f"layer {layer.index} stores tokens in more than one form: its steps differ in shape")

        devices = {str(tail.positions.device) for tail in self._tails()}
        if len(devices) > 1:
            raise ValueError(f"layers lie on {' and '.join(sorted(devices))}: a graph is of one device")

    def __enter__(self) -> "CapturedStep":
        return self

    def __exit__(self, *exception) -> None:
        self.graph = None
        for tail in self._tails():
            tail.static = False
        self.cache.memo.lasting = False
        self.cache.memo.close()

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, vocabulary)` after the tokens `ids` `(batch, 1)`; overwritten by the next call."""
        if not self.room:
            raise RuntimeError("there was room for no more tokens")
        self.room -= 1
        self._ids.copy_(ids)
        if self.graph is not None:
            self._count()
            self.graph.replay()
        elif not self._steady():
            self.logits = self._step()
        elif self._ids.is_cuda and self._warm:
            self.graph, device = torch.cuda.CUDAGraph(), self._ids.device
            stream = torch.cuda.Stream(device)
            with torch.cuda.device(device), torch.cuda.graph(self.graph, stream=stream), Brought(self.cache.memo):
                # which does the bookkeeping, but no work
                self.logits = self._step()
            self.graph.replay()
        else:
            self._make_static()
            self.logits = self._off_the_main_stream() if self._ids.is_cuda else self._step()
            self._warm += 1
        return self.logits

    def _tails(self):
        return [layer.tail for layer in self.cache.layers]

    def _step(self) -> torch.Tensor:
        with torch.no_grad():
            return self.run.model(input_ids=self._ids, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def _off_the_main_stream(self) -> torch.Tensor:
        """A step that makes ready what must not be made while capturing: workspaces, compiled kernels."""
        device = self._ids.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), Brought(self.cache.memo):
            logits = self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
        return logits

    def _steady(self) -> bool:
        """Will all steps from now on do the same?"""
        return all(tail.vacant for tail in self._tails()) if self._evicts else True

    @property
    def _evicts(self) -> bool:
        """Does a token go for each that comes?"""
        return self.run.method.evicts and self.run.method.evicts_in_decode

    def _make_static(self) -> None:
        """Layers that grow and token ids get their room; what follows from lengths alone is worked out once."""
        self.cache.reserve_ids(int(self.cache.tokens.max()) + self.room + 1)
        self.cache.memo.lasting = True
        for tail in self._tails():
            if not tail.static:
                tail.reserve(0 if tail.vacant else self.room + 1)  # a hole is all the room that is needed
            tail.static = True

    def _count(self) -> None:
        """What a pass notes on the CPU."""
        cache = self.cache
        cache.steps, cache.seen, cache.tokens = cache.steps + 1, cache.seen + 1, cache.tokens + 1
        for tail in self._tails():
            if not tail.vacant:
                tail.count(1)


class Brought(TorchFunctionMode):
    """Inside the block: counts that are brought from the CPU to a device are kept in `memo` and not brought again.

    A graph cannot bring them. Those that follow from the prompt, as numbers of tokens to choose do, were brought by the
    step before; others would not change from step to step, and it is right that CUDA refuses them.
    """

    def __init__(self, memo: dict):
        super().__init__()
        self.memo = memo

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        x, *where = arguments or (None,)
        if function is not torch.Tensor.to or x.device.type != "cpu" or x.is_floating_point():
            return function(*arguments, **options)
        place = (function, x.dtype, x.shape, x.numpy().tobytes(), *where, *options.items())
        if place not in self.memo:
            self.memo[place] = function(*arguments, **options)
        return self.memo[place].clone()  # it is the caller's
