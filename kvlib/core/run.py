"""Applying a method to a model for the length of a `with` block.

A prompt's way: `generate` is shadowed to know where the prompt ends; before each forward pass the cache is adopted and
the pass is read (`kvlib.core.step`); in every layer transformers calls `forward` below, the only place that sees
queries, keys, values and the positions of all of them, so this is where tokens are stored, attended to and evicted.
"""

import inspect
import math
import threading

import torch
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from kvlib.core import packed, recorded, support
from kvlib.core.blocks import NAME, Blocks
from kvlib.core.cache import KVCache
from kvlib.core.capture import CapturedStep
from kvlib.core.report import Report
from kvlib.core.residual import shorten
from kvlib.core.step import Step, check_mask, decode_step, reading_step
from kvlib.core.view import View


def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function that transformers calls: store, attend, observe, compress.

    Args:
        query: `(batch, query_heads, new, head_dim)`; key, value: `(batch, kv_heads, new, head_dim)`, new tokens only.

    Returns:
        output `(batch, new, query_heads, head_dim)` and None for the weights.

    Raises:
        ValueError: for attention that kvlib does not reproduce.
    """
    run = module.__dict__["_kvlib_runs"][-1]
    if run.step is None:
        raise RuntimeError("inside the block call the model itself, not model.model or model.forward")
    support.refuse(module, kwargs, run.step.longest, run.chunks[module.layer_idx])
    layer, decoding = run.cache.layers[module.layer_idx], run.step.decoding
    tail = layer.tail
    left_alone = decoding and run.idle and tail.dense and layer.body is None and not packed.UNIFORM
    extends = left_alone and (tail.recorded or tail.outgrown) and recorded.extends(run, layer, key.device, dropout)
    if left_alone and not extends:
        return pass_by(tail, run.step, module, query, key, value, scaling, dropout), None

    def work(query, key, value):
        view = run.store(module, query, key, value, scaling, dropout)
        output = run.method.attend(view)
        run.settle(view)
        return output

    if extends:
        return recorded.extend(run, layer, work, (query, key, value)), None
    if decoding and run.steady and recorded.replays(run, layer, key.device, dropout):
        return recorded.replay(run, layer, work, (query, key, value)), None
    return work(query, key, value), None


def pass_by(tail, step, module, query, key, value, scaling, dropout) -> torch.Tensor:
    """What `forward` comes to for a decoded token that the method leaves alone, where no slot is hidden.

    No view is opened, which would take as long as everything else here.
    """
    key, value = tail.with_one(key, value, step.on(key.device).positions)
    return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling)[0]


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, support.refuse_future)


class Run(Report):
    """One method on one model: `with method(model) as run: model.generate(...)`.

    Everything is undone when the block ends; what the run reports describes its latest cache and stays valid: after
    `read` the document, after `ask` the copy that holds the question and its answer too.

    Attributes:
        idle: the method leaves decoded tokens alone. steady: `recorded.steady` says so of its class.
        document: the compressed cache that `read` has left, which `ask` copies; None if there is none.
        prepared: what the method's `prepare` has made of the model; there as long as the block is open.
        step: the forward pass that is going on, None between passes.
        chunks: `support.attention_chunk` of each layer.
    """

    def __init__(self, method, model):
        super().__init__()
        self.method, self.model = method, model
        self.modules = support.attention_modules(model)
        self.short_rotation = support.short_rotation(model)
        self.chunks = list(map(support.attention_chunk, self.modules))
        self.encodes = method.hooks("encode") or method.hooks("decode")
        looks = any(map(method.hooks, ("encode", "decode", "before_layer", "attend", "observe", "finish")))
        self.idle = not (looks or method.evicts_in_decode)
        self.steady = type(method) in recorded.STEADY
        self.prepared = None
        self.document: KVCache | None = None
        self.step: Step | None = None
        parameters = inspect.signature(model.forward).parameters
        self._names = [name for name, x in parameters.items() if x.kind is x.POSITIONAL_OR_KEYWORD]
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._prompt_columns: float | None = None  # where the prompt ends that is being read, if that is known
        self._unended: KVCache | None = None  # a document of which more will come
        self._answering: KVCache | None = None  # the copy in which a question is read and answered
        self._probing = self._rereading = False
        self._inside = False  # a pass goes on in which another one begins
        self._hooks: list = []  # while the block is open
        self._blocks: Blocks | None = None  # likewise
        self.thread = self.frame = None  # likewise: who has opened it (`kvlib.core.blocks`)

    # Entering and leaving

    def __enter__(self) -> "Run":
        if self._hooks:
            raise RuntimeError("this run is already open on this model")
        self.prepared = self._prepare()
        self._blocks = Blocks.open(self)
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]
        if self.method.hooks("before_layer"):
            for layer, module in zip(support.decoder_layers(self.model, self.modules), self.modules, strict=True):
                hook = shorten(self, module.layer_idx)
                self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def _prepare(self):
        """What the method makes of the model.

        Weights that wait in host memory or on a disk are brought if it has met some of them, and not before: those of
        all layers may not fit at once.
        """
        offloaded = any(x.is_meta for module in self.modules for x in module.parameters())
        try:
            prepared = self.method.prepare(self.model)
        except RuntimeError:  # values were asked for that are not there
            if not offloaded:
                raise
        else:
            if not (offloaded and any(torch.is_tensor(x) and x.is_meta for x in tree_leaves(prepared))):
                return prepared
        with support.weights_in_place(self.modules):
            return self.method.prepare(self.model)

    def __exit__(self, *exception) -> None:
        self._blocks.close(self)
        while self._hooks:
            self._hooks.pop().remove()
        self.step = self.prepared = self._blocks = None

    @property
    def active(self) -> bool:
        """False while a later block is open, and outside."""
        return self._blocks is not None and self._blocks.runs[-1:] == [self]

    def __reduce_ex__(self, protocol):
        raise TypeError("a model cannot be copied or pickled inside a `with method(model)` block: do it outside")

    # A document and questions about it

    @torch.no_grad()
    def read(self, more: bool = False, prefill_chunk_size: int | None = None, **inputs) -> None:
        """Read a document and compress it, for `ask`. A new document takes the place of the one before.

        A document may arrive in chunks, by one call each: `more` says that it goes on with the next. It is compressed
        when it has ended, and is then what it would be had it come in one piece.

        Args:
            inputs: as for the model: `input_ids` `(batch, tokens)` or `inputs_embeds`, and an `attention_mask` of the
                same columns if rows are padded, on the left.
            prefill_chunk_size: columns read at a time; all at once by default.
        """
        self._require_open()
        cache, self.document, self._unended = self._unended, None, None
        cache = KVCache(len(self.modules), self.method) if cache is None else cache
        text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        _check_text("document", text, inputs.get("attention_mask"))
        columns, size = text.shape[1], text.shape[1] if prefill_chunk_size is None else prefill_chunk_size
        if size < 1:
            raise ValueError(f"prefill_chunk_size={size}: a number of columns >= 1")
        end = cache.seen + columns
        try:
            for start in range(0, columns, size):
                self._prompt_columns = math.inf if more else end
                chunk = {
                    name: x[:, start : start + size] if torch.is_tensor(x) and x.shape[1:2] == (columns,) else x
                    for name, x in inputs.items()
                }
                self.model(**chunk, **self._last_logits, past_key_values=cache, use_cache=True)
        finally:
            self._prompt_columns = None
        if more:
            self._unended = cache
        else:
            self.document = cache

    def ask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **arguments):
        """Answer a question about the document that was read, from a copy of its cache.

        The document stays as it is, so that no question knows of another. Nothing is evicted while the question is
        read; methods that evict while decoding return to the document's budgets after it, and after each token of the
        answer.

        Args:
            input_ids, attention_mask: the question, `(batch, tokens)`, padded on the left: a row for each row of the
                document, or any number of questions about a document of one row.
            arguments: as for `generate`.

        Returns:
            What `generate` returns for the question: ids of the question and its answer, or a `ModelOutput`.

        Raises:
            RuntimeError: if no document was read, or if its end has not been read.
            ValueError: if the question has neither one row nor as many as the document.
        """
        self._require_open()
        if self.document is None:
            missing = (
                "call `run.read` without `more` for its end" if self._unended is not None else "call `run.read` first"
            )
            raise RuntimeError(f"there is no document to ask about: {missing}")
        _check_text("question", input_ids, attention_mask)
        rows, tokens = len(input_ids), self.document.tokens
        if len(tokens) not in (1, rows):
            raise ValueError(
                f"{rows} questions about {len(tokens)} documents: repeat rows, so that each question has its document"
            )
        question = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        before = torch.arange(self.document.seen) >= self.document.seen - tokens[:, None]  # its padding came first
        mask = torch.cat([before.to(question).expand(rows, -1), question], dim=1)
        option, cache = self._options(arguments), self.document.copy()
        repeats = max(option("num_beams") or 1, option("num_return_sequences") or 1)  # as `generate` repeats its rows
        if (repeats := repeats * rows // len(tokens)) > 1:
            cache.batch_repeat_interleave(repeats)
        self._answering = cache
        try:
            return self.model.generate(input_ids, attention_mask=mask, past_key_values=cache, **arguments)
        finally:
            self._answering = None

    @torch.no_grad()
    def follow(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
        """Read a question into the latest cache itself, as `ask` does in its copy, and return the model's output.

        What comes next is decoded, token by token.

        Args:
            input_ids, attention_mask: `(batch, tokens)`, padded on the left, a row for each row of the cache.

        Raises:
            RuntimeError: if nothing has been read.
        """
        self._require_open()
        if self.cache is None:
            raise RuntimeError("nothing to follow: read something first")
        _check_text("question", input_ids, attention_mask)
        cache = self._answering = self.cache
        self._prompt_columns = cache.seen + input_ids.shape[1]
        try:
            return self.model(input_ids, attention_mask=attention_mask, past_key_values=cache, **self._last_logits)
        finally:
            self._answering = self._prompt_columns = None

    def _require_open(self) -> None:
        if not self.active:
            raise RuntimeError("read and ask inside the block, and inside the latest one if several are open")

    # Before and after a forward pass

    def _generate(self, *args, **kwargs):
        """`model.generate` inside the block: as always, after noting where the prompt ends."""
        if self._blocks is None:
            raise RuntimeError(CLOSED)
        kwargs = self.method.on_generate(self, kwargs)
        option = self._options(kwargs, args[1] if len(args) > 1 else None)
        if any(map(option, ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"))):
            raise ValueError("assisted decoding rolls the cache back, which a compressed cache cannot do")
        if option("guidance_scale") not in (None, 1):
            raise ValueError(
                "guidance_scale reads a second prompt with a cache of its own, which kvlib does not support"
            )
        # transformers reads the ids as the whole sequence, or, if the mask is longer, as its end
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        ids = next((x for x in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if x is not None), None)
        inputs = (mask, ids, kwargs.get("inputs_embeds"))
        columns = next((x.shape[1] for x in inputs if x is not None), 1)
        if cache is not None and columns <= (seen := cache.get_seq_length()):
            raise ValueError(
                f"{columns} columns, but the cache has seen {seen}: pass all ids, or new ones with a mask over all"
            )
        if isinstance(cache, KVCache) and cache.seen and ids is not None:
            cache.check_ids(ids, mask, option("pad_token_id"))
        with self._blocks.during_generate():
            self._prompt_columns = columns
            try:
                made = type(self.model).generate(self.model, *args, **kwargs)
            finally:
                self._prompt_columns = None
        if self._blocks is None:
            raise RuntimeError(CLOSED)
        return made

    def _options(self, arguments: dict, given=None):
        """A function that looks options of `generate` up: what a call and its configuration leave open, the model's
        configuration decides.
        """
        places = (arguments.get("generation_config") or given, self.model.generation_config)

        def option(name):
            values = (arguments.get(name), *(getattr(place, name, None) for place in places))
            return next((value for value in values if value is not None), None)

        return option

    def _before_forward(self, model, args, kwargs):
        """Adopt the cache and work out which tokens this pass brings."""
        if not self.active:
            return None
        self._blocks.begin_pass()
        if args:
            named = dict(zip(self._names, args))
            if len(named) < len(args) or named.keys() & kwargs.keys():
                return None  # python will say what is wrong with the call
            kwargs = named | kwargs
        use_cache = kwargs.get("use_cache")
        if use_cache is False or (use_cache is None and not model.config.get_text_config().use_cache):
            raise ValueError("use_cache=False leaves nothing to compress")
        weights = kwargs.get("output_attentions")
        if model.config.output_attentions if weights is None else weights:
            raise ValueError("output_attentions: inside the block attention weights are never held as a whole")
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ValueError(
                "gradient checkpointing runs layers twice, which would store their tokens twice: call "
                "`model.gradient_checkpointing_disable()` or `model.eval()` first"
            )
        support.refuse_images(model, kwargs)
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        inputs = ids if ids is not None else kwargs["inputs_embeds"]
        if self._answering is not None and kwargs.get("past_key_values") is not self._answering:
            raise RuntimeError(f"{type(model).__name__} has dropped the document's cache and would answer without it")
        cache = KVCache.adopt(kwargs.get("past_key_values"), len(self.modules), self.method)
        if cache.interrupted:
            raise ValueError("a forward pass over this cache was interrupted half-way; start a new one")
        if not cache.seen:
            self._unclamp(len(inputs))
        elif len(inputs) != len(cache.tokens):
            raise ValueError(
                f"{len(inputs)} rows, but the cache has {len(cache.tokens)}; num_beams and num_return_sequences repeat "
                "those of a prompt, for a cache do it before: `cache.batch_repeat_interleave(repeats)`"
            )
        self.cache = kwargs["past_key_values"] = cache
        check_mask(mask, len(inputs), inputs.shape[1])
        given = kwargs.get("position_ids")
        if given is not None and given.ndim not in (2, 3):  # of several dimensions, which are equal for text
            raise ValueError(POSITIONS)
        step = self._read(inputs, mask)
        short = self.short_rotation if cache is self._answering else None
        if short is not None and int(cache.prompt_tokens.max()) <= short < step.longest:
            raise ValueError(
                f"the model turns all keys anew beyond {short} tokens, and those of a shorter document are stored "
                "already: give `generate` the document and the question as one prompt"
            )
        looked_at = given is not None and (given.device.type == "cpu" or not step.decoding)  # as masks are
        if looked_at and bool(((given != step.positions) & (step.positions >= 0)).any()):
            raise ValueError(POSITIONS)
        kwargs["position_ids"] = step.positions if step.complete else step.positions.clamp(min=0)
        self._begin(step)
        if not step.aside:
            cache.note_ids(ids, step)
        for layer in cache.layers:
            layer.accepting = True
        self.method.on_token_ids(self, ids)
        cache.interrupted = True
        return (), kwargs

    def _read(self, inputs, mask) -> Step:
        """What kind of pass this is: `generate` has said where the prompt ends; without it several tokens are one."""
        cache, new, end = self.cache, inputs.shape[1], self._prompt_columns
        reads = cache.seen + new <= end if end is not None else new > 1
        aside = self._probing or self._rereading
        if not (reads or aside or not cache.seen):
            return decode_step(cache, len(inputs), mask)
        # an empty cache in the middle of `generate`: the model has dropped the old one and reads everything again
        step = reading_step(cache, inputs, mask, end if reads else None)
        if aside:
            step.probing, step.rereading = self._probing, self._rereading
            step.ends_prompt, step.prompt_tokens = False, cache.prompt_tokens
            return step
        if cache is self._answering:
            step.question, step.ends_question = True, step.ends_prompt
            step.ends_prompt, step.prompt_tokens = False, cache.prompt_tokens
        self._fit(step)
        return step

    def _fit(self, step: Step) -> None:
        """Make sure that what this pass brings fits the model's window, with what it is read with.

        Raises:
            ValueError: if it does not.
        """
        window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if window is None or step.longest <= window:
            return
        if not self.method.renumber:
            raise ValueError(f"the prompt has {step.longest} tokens, the model's window is {window}")
        new = int(step.counts.max())
        if self._held() + new > window >= new and not step.question:
            self._compress_early()
        if self._held() + new > window:
            raise ValueError(
                f"{new} new tokens and {self._held()} that are stored exceed the model's window of {window}: read a "
                "prompt in smaller chunks (`prefill_chunk_size`), keep less, or ask a shorter question"
            )

    def _held(self) -> int:
        """Tokens in the longest segment of the cache."""
        return max((int(layer.lengths.max()) for layer in self.cache.layers if layer.tail is not None), default=0)

    def _compress_early(self) -> None:
        """Compress as if the prompt had ended before this pass."""
        cache, none = self.cache, torch.zeros_like(self.cache.tokens)
        positions = cache.ends.expand(-1, 0)
        step = Step(0, True, cache.seen, positions, none, cache.tokens, cache.tokens, complete=True)
        self._begin(step)
        cache.interrupted = True
        for layer in range(len(cache.layers)):
            self.method.compress(self.view(layer))
        cache.interrupted = False
        self._close()
        self.streamed = True

    def _begin(self, step: Step, again: bool = False) -> None:
        if not (step.after_prompt or step.aside or again):
            self.cache.notes = {}
        self.cache.steps = step.index
        self.cache.memo.open = True
        self.step = step

    def _after_forward(self, model, args, output):
        if not self.active or self._blocks.passing != threading.get_ident():
            return
        try:
            if self.step is None:  # the pass was refused
                return
            for layer in self.cache.layers:
                layer.accepting = False
            if output is not None:  # which is what a hook gets after an exception
                self._end(self.step)
                self.cache.interrupted = False
        finally:
            if self.step is not None:
                self._close()
            if not self._inside:
                self._blocks.end_pass()

    def _close(self) -> None:
        self.step = None
        self.cache.memo.close()

    def _end(self, step: Step) -> None:
        """After the last layer: note what has been read, and let the method finish."""
        step.view = None  # it holds keys that were just evicted, and in a cycle they would wait for the collector
        cache = self.cache
        cache.seen, cache.tokens, cache.prompt_tokens = step.seen, step.tokens, step.prompt_tokens
        if not step.aside and self.method.hooks("finish"):
            with torch.no_grad():
                self.method.finish(self)
            step.view = None
        if step.decoding:
            cache.ends.add_(1)  # in place, so that a captured step counts on; these are the step's positions
        else:
            cache.ends = step.ends[:, None].clone()

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
        here = step.on(key.device)
        chunk = method.encode(self, layer, key, value, here.positions)
        one = step.complete and key.shape[2] == 1
        layer.append(chunk, here.stored, None if one else step.counts, key.shape[1])
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
        if step.ends_prompt or (method.evicts_in_decode and (step.decoding or step.ends_question)):
            method.compress(view)
        if step.aside:
            return
        if step.decoding or step.ends_prompt or step.ends_question or not method.window:
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
        cache = self.cache
        before = cache.seen, cache.tokens, cache.prompt_tokens
        lengths = [layer.tail.lengths for layer in cache.layers]
        self._probing = True
        try:
            self._pass_aside(ids.clamp(min=0), ids >= 0, **self._last_logits)  # nobody asks for logits
        finally:
            self._probing = False
        for layer, length in zip(cache.layers, lengths):
            layer.tail.truncate(length)
        cache.seen, cache.tokens, cache.prompt_tokens = before

    @torch.no_grad()
    def reread(self, count: int) -> torch.Tensor:
        """Compute the newest tokens once more, in one pass in which each attends to everything before it.

        What was stored of them is replaced: for tokens that were decoded from less. No budget changes and nothing is
        evicted. What the pass reads is added to what the latest step has read.

        Args:
            count: tokens of every row.

        Returns:
            logits `(batch, count, vocabulary)` after each of them.

        Raises:
            RuntimeError: if nothing has been read.
            ValueError: as `KVCache.forget`, and where embeddings were passed in place of ids.
        """
        self._require_open()
        cache = self._filled()
        at = cache.tokens.to(cache.ids.device)[:, None] - count + torch.arange(count, device=cache.ids.device)
        ids = cache.ids.gather(1, at.clamp(min=0)).long()
        if bool((ids < 0).any()):
            raise ValueError("embeddings were passed in place of ids, and cannot be read again")
        ends, reads = cache.ends, [layer.row_reads() for layer in cache.layers]
        cache.forget(torch.full_like(cache.tokens, count))
        self._rereading = True
        try:
            logits = self._pass_aside(ids, None).logits
        finally:
            self._rereading = False
        cache.ends = ends
        for layer, read in zip(cache.layers, reads):
            layer.reads = read + layer.row_reads()
        return logits

    def _pass_aside(self, ids: torch.Tensor, mask: torch.Tensor | None, **more):
        """A pass between two others, or inside of one, after which the text goes on as if there had been none."""
        step, cache, columns, inside = self.step, self.cache, self._prompt_columns, self._inside
        before = cache.ends, cache.steps, cache.interrupted
        self._prompt_columns, self._inside = None, step is not None
        cache.interrupted = False  # but for the method that is finishing
        try:
            output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
        finally:
            self._prompt_columns, self._inside = columns, inside
        cache.ends, cache.steps, cache.interrupted = before
        if step is not None:
            self._begin(step, again=True)
        return output

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
        self.cache.note_ids(snapshot.ids, self.step)
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
CLOSED = "this block has been closed: call `generate`, and read a streamer to its end, inside the block"


def _check_text(kind: str, text: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raise ValueError for a document or a question of no tokens, and for a mask of other columns."""
    if not text.shape[1]:
        raise ValueError(f"a {kind} of no tokens")
    if mask is not None and mask.shape != text.shape[:2]:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: the {kind} has {tuple(text.shape[:2])} (batch, columns)"
        )
