"""Applying a method to a model for the length of a `with` block, and reporting on the cache it leaves."""

import inspect

import torch
from transformers import PreTrainedModel

from kvlib.core import attention
from kvlib.core.cache import KVCache
from kvlib.core.view import Step, View

RIGHT_PADDING = (
    "padding after a real token: pad on the left (tokenizer.padding_side = 'left'); "
    "in a later turn of a batch all rows need new tokens of the same number"
)


class Run:
    """One method on one model: `with method(model) as run: model.generate(...)`.

    Everything is undone when the block ends; what the run reports describes its latest cache and stays valid.

    Attributes:
        cache: the live transformers cache (None before the first forward pass).
        clamped: name -> `(batch,)` values that the prompt forced into range; empty if nothing had to give.
        clamped_rows: `(batch,)` bool, the rows in which something had to.
    """

    def __init__(self, method, model):
        self.method, self.model = method, model
        self.modules = attention_modules(model)
        self._signature = inspect.signature(model.forward)
        parameters = self._signature.parameters.values()
        self._others = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        self._rotary = next((m for m in model.modules() if hasattr(m, "inv_freq")), None)
        self.cache: KVCache | None = None
        self.clamped: dict[str, torch.Tensor] = {}
        self.clamped_rows = torch.zeros(0, dtype=torch.bool)
        self.step: Step | None = None
        self._prompt_columns: int | None = None
        self._hooks: list = []  # while the block is open

    # Entering and leaving

    def __enter__(self) -> "Run":
        if self._hooks:
            raise RuntimeError("this run is already open on this model")
        self._before = {module: module.__dict__.get("_kvlib_run") for module in [self.model, *self.modules]}
        self._generate_before = self.model.__dict__.get("generate")
        self._implementation = self.model.config._attn_implementation
        self.model.set_attn_implementation(attention.NAME)
        for module in self._before:
            module.__dict__["_kvlib_run"] = self
        self.model.__dict__["generate"] = self._generate
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]
        if self.method.hooks("before_layer"):
            for layer, module in zip(decoder_layers(self.model, self.modules), self.modules, strict=True):
                hook = self._before_layer(module.layer_idx)
                self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for module, run in self._before.items():
            _restore(module.__dict__, "_kvlib_run", run)
        _restore(self.model.__dict__, "generate", self._generate_before)
        self.model.set_attn_implementation(self._implementation)
        self.step = None

    @property
    def _active(self) -> bool:
        """False while a nested block is open."""
        return self.model.__dict__.get("_kvlib_run") is self

    # From the model into the cache

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
        if not self._active:
            return None
        named = self._signature.bind_partial(*args, **kwargs).arguments
        kwargs = named.pop(self._others, {}) | named
        use_cache = kwargs.get("use_cache")
        if use_cache is False or (use_cache is None and not model.config.get_text_config().use_cache):
            raise ValueError("use_cache=False leaves nothing to compress")
        if kwargs.get("output_attentions", model.config.output_attentions):
            raise ValueError("output_attentions: inside the block attention weights are never held as a whole")
        ids = kwargs.get("input_ids")
        inputs = ids if ids is not None else kwargs["inputs_embeds"]
        cache = KVCache.adopt(kwargs.get("past_key_values"), len(self.modules), self.method)
        if cache.interrupted:
            raise ValueError("a forward pass over this cache was interrupted half-way; start a new one")
        if cache.get_seq_length() == 0:
            self._unclamp(len(inputs))
        self.cache = kwargs["past_key_values"] = cache
        self.step = self._read(inputs, kwargs.get("attention_mask"), cache)
        given = kwargs.get("position_ids")
        if given is None:
            kwargs["position_ids"] = self.step.positions.clamp(min=0)
        elif given.ndim != 2 or bool(((given != self.step.positions) & (self.step.positions >= 0)).any()):
            raise ValueError(
                "position_ids must count the real tokens of each row: 0, 1, 2, ... after its padding "
                "(generate derives them from attention_mask)"
            )
        cache.share_places({})
        for layer in cache.layers:
            layer.accepting = True
        self.method.on_token_ids(self, ids)
        cache.interrupted = True
        return (), kwargs

    def _read(self, inputs, mask, cache) -> Step:
        batch, new = inputs.shape[:2]
        seen = cache.get_seq_length()
        if mask is not None and (mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < new):
            raise ValueError(
                f"attention_mask of shape {tuple(mask.shape)}: (batch, tokens seen so far) is needed, 1 = real"
            )
        real = torch.ones(batch, new, dtype=torch.bool) if mask is None else mask[:, -new:].bool().cpu()
        if bool((real[:, :-1] & ~real[:, 1:]).any()):
            raise ValueError(RIGHT_PADDING)
        before = cache.layers[0].tokens if seen else torch.zeros(batch, dtype=torch.int64)
        if mask is not None and mask.shape[1] == seen + new and not torch.equal(mask[:, :seen].sum(1).cpu(), before):
            raise ValueError("attention_mask differs from earlier passes over tokens that are already stored")
        positions = (before[:, None] + real.cumsum(1) - 1).where(real, -1)
        tokens = before + real.sum(1)

        columns = seen + new
        reads = columns <= self._prompt_columns if self._prompt_columns is not None else new > 1 or seen == 0
        ends = reads and columns == (self._prompt_columns or columns)
        cache.steps = 0 if reads else cache.steps + 1
        if ends and bool((tokens == 0).any()):
            raise ValueError(f"row {int((tokens == 0).nonzero()[0])} has no real token")
        if ends and not bool(real[:, -1].all()):
            raise ValueError(RIGHT_PADDING)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if reads and limit is not None and int(tokens.max()) > limit:
            raise ValueError(f"the prompt has {int(tokens.max())} tokens, the model's window is {limit}")
        return Step(
            index=cache.steps,
            ends_prompt=ends,
            seen=columns,
            positions=positions.to(inputs.device),
            counts=real.sum(1),
            tokens=tokens,
            prompt_tokens=tokens if reads else cache.layers[0].prompt_tokens,
        )

    def _after_forward(self, model, args, output):
        if self._active and self.step is not None:
            self._end_step()
            self.cache.interrupted = output is None  # which is what a hook gets after an exception
            for layer in self.cache.layers:
                layer.accepting = False

    def _end_step(self) -> None:
        """Let go of what was made for this pass."""
        self.step.view = None  # it holds keys that were just evicted, and in a cycle they would wait for the collector
        self.step = None
        self.cache.share_places(None)

    def _before_layer(self, layer_idx: int):
        """A pre-hook that lets the method shorten the hidden states, and everything that goes with them."""

        def hook(layer, args, kwargs):
            if not self._active:
                return None
            step = self.step
            hidden = args[0] if args else kwargs.pop("hidden_states")
            keep = self.method.before_layer(self, layer_idx)
            if keep is not None:
                keep = keep.to(hidden.device)
                hidden = hidden.gather(1, keep[..., None].expand(-1, -1, hidden.shape[-1]))
                step.positions = step.positions.gather(1, keep.to(step.positions.device))
                step.counts = (step.positions >= 0).sum(1).cpu()
                step.columns = keep if step.columns is None else step.columns.gather(1, keep)
            if step.columns is not None:
                kwargs["position_ids"] = step.positions.clamp(min=0)
                rotary = kwargs["position_embeddings"]
                index = step.columns[..., None]
                kwargs["position_embeddings"] = tuple(
                    x.expand(len(index), -1, -1).gather(1, index.expand(-1, -1, x.shape[-1])) for x in rotary
                )
            return (hidden, *args[1:]), kwargs

        return hook

    def store(self, module, query, key, value, scaling, dropout) -> View:
        """Append the new tokens of one layer and show it to the method."""
        layer, step = self.cache.layers[module.layer_idx], self.step
        layer.append(key, value, step.positions, step.counts)
        layer.seen, layer.tokens, layer.prompt_tokens = step.seen, step.tokens, step.prompt_tokens
        step.view = View(self, layer, module, query, key, value, scaling, dropout)
        return step.view

    @torch.no_grad()
    def settle(self, view: View) -> None:
        """After attention: let the method observe, evict if it is time, keep the queries an unfinished prompt needs.

        Choosing has no gradient, and a graph through the scores would hold on to the whole attention matrix.
        """
        method, layer, step = self.method, view.layer, view.step
        layer.reads = view.reads
        if not method.evicts:
            return
        method.observe(view)
        layer.state = {name: layer.flatten(x) for name, x in view.state.items()}
        if step.ends_prompt or (step.decoding and method.evicts_in_decode):
            evict(method, view)
        if step.decoding or step.ends_prompt or not method.window:
            layer.queries = None
        else:
            # copies, because a view would hold on to the queries of the whole chunk
            layer.queries = tuple(x.clone() for x in view.recent_queries(method.window))

    def fork(self, snapshot) -> KVCache:
        """Start from a snapshot instead of a forward pass: a new cache in which this method has read the prompt.

        Raises:
            ValueError: for methods that change the prefill itself.
        """
        if self.method.own_prefill or any(map(self.method.hooks, ("before_layer", "on_token_ids"))):
            raise ValueError(f"{self.method!r} changes the prefill and cannot start from a snapshot")
        self.cache = KVCache(len(self.modules), self.method)
        self._unclamp(len(snapshot.counts))
        self.step = snapshot.step()
        self.cache.share_places({})
        for module, (query, key, value, scaling) in zip(self.modules, snapshot.layers, strict=True):
            self.settle(self.store(module, query, key, value, scaling, 0.0))
        self._end_step()
        return self.cache

    def _unclamp(self, batch: int) -> None:
        self.clamped, self.clamped_rows = {}, torch.zeros(batch, dtype=torch.bool)

    # Reports

    def kept(self, layer: int) -> torch.Tensor:
        """Which real tokens of each row a layer stores: `(batch, kv_heads, slots)`, ascending, then -1."""
        return self._filled().layers[layer].position_rectangle().long()

    def stored_bytes(self) -> int:
        """Bytes of the storages that hold K and V, each storage counted once."""
        return storage_bytes(x for layer in self._filled().layers for x in (layer.keys, layer.values))

    def state_bytes(self) -> int:
        """Bytes of everything else the cache holds: positions, scores, norms, waiting queries, counts."""
        layers = self._filled().layers
        counts = (x for layer in layers for x in (layer.lengths, layer.tokens, layer.prompt_tokens))
        tensors = (x for layer in layers for x in (layer.positions, *layer.state.values(), *(layer.queries or ())))
        return storage_bytes([*counts, *tensors])

    def full_bytes(self) -> int:
        """Bytes that a native cache needs for the real tokens seen so far: no padding, nothing evicted."""
        layers = self._filled().layers
        per_token = sum(
            layer.lengths.shape[1] * sum(x.shape[1] * x.element_size() for x in (layer.keys, layer.values))
            for layer in layers
        )
        return per_token * int(layers[0].tokens.sum())

    def read_bytes(self) -> int:
        """Bytes of K and V read in the last decode step: what is stored, unless the method reads sparsely."""
        return sum(
            storage_bytes((layer.keys, layer.values)) if layer.reads is None else int(layer.reads.sum())
            for layer in self._filled().layers
        )

    def _filled(self) -> KVCache:
        if self.cache is None:
            raise RuntimeError("the run has no cache yet: call the model inside the block first")
        return self.cache

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """The model's rotary frequencies `(head_dim / 2,)`, for methods that move keys to other positions.

        Raises:
            ValueError: if angles are not position x frequency over the whole head: dynamic or longrope scaling, partial
                rotation, or no rotary embedding at all.
        """
        kind = getattr(self._rotary, "rope_type", None)
        if self._rotary is None or kind in ("dynamic", "longrope") or 2 * len(self._rotary.inv_freq) != head_dim:
            raise ValueError(
                f"keys cannot be re-rotated with rotary embedding {kind!r} over part or all of {head_dim} dimensions"
            )
        return self._rotary.inv_freq


def evict(method, view: View) -> None:
    """Drop from the view's layer all but the `method.budgets` highest-scoring tokens of every segment."""
    budgets = torch.minimum(method.budgets(view), view.lengths)
    if torch.equal(budgets, view.lengths):
        return
    score = method.score(view)
    order = score.masked_fill(view.positions < 0, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    view.layer.keep(rank < budgets[..., None].to(rank.device), budgets)


def storage_bytes(tensors) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def attention_modules(model) -> list:
    """The attention modules of a decoder-only transformers model, by layer.

    Raises:
        ValueError: for models whose attention does not go through transformers' attention interface in every layer.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no transformers model: pass the one inside it")
    config = model.config.get_text_config()
    modules = sorted(
        (m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")), key=lambda m: m.layer_idx
    )
    kind = type(modules[0]).__name__ if modules else type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; kvlib compresses decoder-only models")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{kind} does not use transformers' attention interface, which kvlib needs")
    if [m.layer_idx for m in modules] != list(range(config.num_hidden_layers)):
        raise ValueError(
            f"{type(model).__name__}: {len(modules)} attention modules ({kind}) in {config.num_hidden_layers} layers"
        )
    return modules


def decoder_layers(model, modules) -> list:
    """The modules that contain the attention modules, in the same order."""
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    return [parents[id(module)] for module in modules]


def _restore(attributes: dict, name: str, value) -> None:
    if value is None:
        attributes.pop(name, None)
    else:
        attributes[name] = value
