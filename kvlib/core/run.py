"""Applying a method to a model for the length of a `with` block.

A prompt's way: `generate` is shadowed to know where the prompt ends; before each forward pass the cache is adopted and
the pass is read (`kvlib.core.step`); in every layer transformers calls `forward` below, the only place that sees
queries, keys, values and the positions of all of them, so this is where tokens are stored, attended to and evicted.
"""

import inspect

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvlib.core import support
from kvlib.core.cache import KVCache
from kvlib.core.capture import CapturedStep
from kvlib.core.report import Report
from kvlib.core.residual import shorten
from kvlib.core.step import Step, check_mask, decode_step, reading_step
from kvlib.core.view import View

NAME = "kvlib"


def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function that transformers calls: store, attend, observe, compress.

    Args:
        query: `(batch, query_heads, new, head_dim)`; key, value: `(batch, kv_heads, new, head_dim)`, new tokens only.

    Returns:
        output `(batch, new, query_heads, head_dim)` and None for the weights.

    Raises:
        ValueError: for attention that kvlib does not reproduce.
    """
    run = module.__dict__["_kvlib_run"]
    if run.step is None:
        raise RuntimeError("inside the block call the model itself, not model.model or model.forward")
    support.refuse(module, kwargs, run.longest)
    view = run.store(module, query, key, value, scaling, dropout)
    output = run.method.attend(view)
    run.settle(view)
    return output, None


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, support.refuse_future)


class Run(Report):
    """One method on one model: `with method(model) as run: model.generate(...)`.

    Everything is undone when the block ends; what the run reports describes its latest cache and stays valid.

    Attributes:
        prepared: what the method's `prepare` has made of the model; there as long as the block is open.
        step: the forward pass that is going on, None between passes.
    """

    def __init__(self, method, model):
        super().__init__()
        self.method, self.model = method, model
        self.modules = support.attention_modules(model)
        self._decoder = support.decoder(model)
        self.encodes = method.hooks("encode") or method.hooks("decode")
        self.prepared = None
        self.step: Step | None = None
        self.longest = 0  # tokens of the longest row in this pass
        self._signature = inspect.signature(model.forward)
        parameters = self._signature.parameters.values()
        self._others = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        self._prompt_columns: int | None = None
        self._probing = False
        self._hooks: list = []  # while the block is open

    # Entering and leaving

    def __enter__(self) -> "Run":
        if self._hooks:
            raise RuntimeError("this run is already open on this model")
        self.prepared = self.method.prepare(self.model)
        self._before = {module: module.__dict__.get("_kvlib_run") for module in [self.model, *self.modules]}
        self._generate_before = self.model.__dict__.get("generate")
        self._implementation = self._decoder.config._attn_implementation
        self._decoder.set_attn_implementation(NAME)
        for module in self._before:
            module.__dict__["_kvlib_run"] = self
        self.model.__dict__["generate"] = self._generate
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]
        if self.method.hooks("before_layer"):
            for layer, module in zip(support.decoder_layers(self.model, self.modules), self.modules, strict=True):
                hook = shorten(self, module.layer_idx)
                self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for module, run in self._before.items():
            _restore(module.__dict__, "_kvlib_run", run)
        _restore(self.model.__dict__, "generate", self._generate_before)
        self._decoder.set_attn_implementation(self._implementation)
        self.step = self.prepared = None

    @property
    def active(self) -> bool:
        """False while a nested block is open."""
        return self.model.__dict__.get("_kvlib_run") is self

    # Before and after a forward pass

    def _generate(self, *args, **kwargs):
        """`model.generate` inside the block: as always, after noting where the prompt ends."""
        kwargs = self.method.on_generate(self, kwargs)
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)

        def option(name):  # what a call or its configuration leaves open, the model's configuration decides
            values = (kwargs.get(name), getattr(given, name, None), getattr(self.model.generation_config, name, None))
            return next((value for value in values if value is not None), None)

        if any(map(option, ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"))):
            raise ValueError("assisted decoding rolls the cache back, which a compressed cache cannot do")
        if option("guidance_scale") not in (None, 1):
            raise ValueError(
                "guidance_scale reads a second prompt with a cache of its own, which kvlib does not support"
            )
        # transformers reads the ids as the whole sequence, or, if the mask is longer, as its end
        inputs = [kwargs.get("attention_mask"), *args[:1], *map(kwargs.get, ("inputs", "input_ids", "inputs_embeds"))]
        columns, cache = next((x.shape[1] for x in inputs if x is not None), 1), kwargs.get("past_key_values")
        if cache is not None and columns <= (seen := cache.get_seq_length()):
            raise ValueError(
                f"{columns} columns, but the cache has seen {seen}: pass all ids, or new ones with a mask over all"
            )
        self._prompt_columns = columns
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            self._prompt_columns = None

    def _before_forward(self, model, args, kwargs):
        """Adopt the cache and work out which tokens this pass brings."""
        if not self.active:
            return None
        if args:
            named = self._signature.bind_partial(*args, **kwargs).arguments
            kwargs = named.pop(self._others, {}) | named
        use_cache = kwargs.get("use_cache")
        if use_cache is False or (use_cache is None and not model.config.get_text_config().use_cache):
            raise ValueError("use_cache=False leaves nothing to compress")
        if kwargs.get("output_attentions", model.config.output_attentions):
            raise ValueError("output_attentions: inside the block attention weights are never held as a whole")
        support.refuse_images(model, kwargs)
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        inputs = ids if ids is not None else kwargs["inputs_embeds"]
        cache = KVCache.adopt(kwargs.get("past_key_values"), len(self.modules), self.method)
        if cache.interrupted:
            raise ValueError("a forward pass over this cache was interrupted half-way; start a new one")
        if not cache.seen:
            self._unclamp(len(inputs))
        self.cache = kwargs["past_key_values"] = cache
        check_mask(mask, len(inputs), inputs.shape[1])
        given = kwargs.get("position_ids")
        if given is not None and given.ndim not in (2, 3):  # of several dimensions, which are equal for text
            raise ValueError(POSITIONS)
        step = self._read(inputs, mask)
        looked_at = given is not None and (given.device.type == "cpu" or not step.decoding)  # as masks are
        if looked_at and bool(((given != step.positions) & (step.positions >= 0)).any()):
            raise ValueError(POSITIONS)
        kwargs["position_ids"] = step.positions if step.complete else step.positions.clamp(min=0)
        self._begin(step)
        for layer in cache.layers:
            layer.accepting = True
        self.method.on_token_ids(self, ids)
        cache.interrupted = True
        return (), kwargs

    def _read(self, inputs, mask) -> Step:
        """What kind of pass this is: `generate` has said where the prompt ends; without it several tokens are one."""
        cache, new, end = self.cache, inputs.shape[1], self._prompt_columns
        reads = cache.seen + new <= end if end is not None else new > 1 or not cache.seen
        if not (reads or self._probing):
            return decode_step(cache, len(inputs), mask)
        window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        step = reading_step(cache, inputs, mask, None if self._probing else end, None if self._probing else window)
        if self._probing:
            step.probing, step.ends_prompt, step.prompt_tokens = True, False, cache.prompt_tokens
        return step

    def _begin(self, step: Step, again: bool = False) -> None:
        if not (step.decoding or step.probing or again):
            self.cache.notes = {}
        self.cache.memo.open = True
        self.step, self.longest = step, int(step.tokens.max())

    def _after_forward(self, model, args, output):
        if not self.active or self.step is None:
            return
        for layer in self.cache.layers:
            layer.accepting = False
        try:
            if output is not None:  # which is what a hook gets after an exception
                self._end(self.step)
                self.cache.interrupted = False
        finally:
            self._close()

    def _close(self) -> None:
        self.step = None
        self.cache.memo.close()

    def _end(self, step: Step) -> None:
        """After the last layer: note what has been read, and let the method finish."""
        step.view = None  # it holds keys that were just evicted, and in a cycle they would wait for the collector
        cache = self.cache
        cache.seen, cache.tokens, cache.prompt_tokens = step.seen, step.tokens, step.prompt_tokens
        if step.decoding:
            cache.ends.add_(1)  # in place, so that a captured step counts on
        else:
            cache.ends = step.ends[:, None].clone()
        if not step.probing and self.method.hooks("finish"):
            with torch.no_grad():
                self.method.finish(self)
            step.view = None

    # In a layer

    def store(self, module, query, key, value, scaling, dropout) -> View:
        """Append the new tokens of one layer and show it to the method.

        Raises:
            ValueError: if the layer has been here in this pass.
        """
        layer, step, method = self.cache.layers[module.layer_idx], self.step, self.method
        if step.view is not None and step.view.layer is layer:
            raise ValueError(f"{type(module).__name__} attends twice in a layer, which kvlib does not support")
        if layer.tail is None:
            layer.token_bytes = sum(x.shape[-1] * x.element_size() for x in (key, value))
        elif not step.decoding or method.text_order:
            layer.tail.restore_order()
        chunk = method.encode(self, layer, key, value, step.positions.to(key.device))
        one = step.complete and key.shape[2] == 1
        layer.append(chunk, step.stored.to(key.device), None if one else step.counts, key.shape[1])
        layer.reads = None
        step.view = View(self, layer, module, query, key, value, scaling, dropout)
        return step.view

    def settle(self, view: View) -> None:
        """After attention: let the method observe, compress if it is time, keep the queries an unfinished prompt needs.

        Choosing has no gradient, and a graph through the scores would hold on to the whole attention matrix.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.settle(view)
        method, layer, step = self.method, view.layer, view.step
        method.observe(view)
        view.save_state()
        if step.ends_prompt or (step.decoding and method.evicts_in_decode):
            method.compress(view)
        if step.probing:
            return
        if step.decoding or step.ends_prompt or not method.window:
            layer.queries = None
        else:
            # copies, because a view would hold on to the queries of the whole chunk
            layer.queries = tuple(x.clone() for x in view.recent_queries(method.window))

    # For methods

    def view(self, layer_idx: int) -> View:
        """One layer as it is after a pass, without queries: to choose in `finish`."""
        layer, module = self.cache.layers[layer_idx], self.modules[layer_idx]
        key = torch.empty(len(self.cache.tokens), layer.lengths.shape[1], 0, 0, device=layer.tail.positions.device)
        return View(self, layer, module, key, key, key, None, 0.0)

    def probe(self, ids: torch.Tensor) -> None:
        """Read more tokens after the prompt, let the method observe them, and forget them: only state remains.

        Args:
            ids: `(batch, new)`, -1 = padding, which must come first.
        """
        step, cache = self.step, self.cache
        before = cache.seen, cache.tokens, cache.prompt_tokens, cache.ends, cache.steps, cache.interrupted
        lengths = [layer.tail.lengths for layer in cache.layers]
        mask = ids >= 0
        self._probing, columns, self._prompt_columns = True, self._prompt_columns, None
        cache.interrupted = False  # but for the method that is finishing
        try:
            self.model(input_ids=ids.clamp(min=0), attention_mask=mask, past_key_values=cache, use_cache=True)
        finally:
            self._probing, self._prompt_columns = False, columns
        for layer, length in zip(cache.layers, lengths):
            layer.tail.truncate(length)
        cache.seen, cache.tokens, cache.prompt_tokens, cache.ends, cache.steps, cache.interrupted = before
        self._begin(step, again=True)

    def fork(self, snapshot) -> KVCache:
        """Start from a snapshot instead of a forward pass: a new cache in which this method has read the prompt.

        Raises:
            ValueError: for methods that change the prefill itself.
        """
        if self.method.own_prefill or self.method.hooks("before_layer"):
            raise ValueError(f"{self.method!r} changes the prefill and cannot start from a snapshot")
        self.cache = KVCache(len(self.modules), self.method)
        self._unclamp(len(snapshot.counts))
        self._begin(snapshot.step())
        self.method.on_token_ids(self, snapshot.ids)
        for module, (query, key, value, scaling) in zip(self.modules, snapshot.layers, strict=True):
            self.settle(self.store(module, query, key, value, scaling, 0.0))
        self._end(self.step)
        self._close()
        return self.cache

    def capture(self, room: int) -> CapturedStep:
        """Decode up to `room` tokens by a captured step; see `kvlib.core.capture`."""
        return CapturedStep(self, room)


POSITIONS = (
    "position_ids must count the real tokens of each row: 0, 1, 2, ... after its padding "
    "(generate derives them from attention_mask)"
)


def _restore(attributes: dict, name: str, value) -> None:
    if value is None:
        attributes.pop(name, None)
    else:
        attributes[name] = value
