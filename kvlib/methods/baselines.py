"""The baselines: full cache, random eviction, StreamingLLM, H2O, Scissorhands, SnapKV, PyramidKV, TOVA and key norms.

All choose tokens per KV head and, unless said otherwise, evict once, at the end of the prompt. Those that can host a
factor on attention (`kvlib.methods.vatp`) read attention as `view.importance` and answer `recent(view)`: how many of
the newest tokens they protect, on the CPU, `(batch,)` or, where heads have budgets of their own, `(batch, kv_heads)`.
"""

import torch
import torch.nn.functional as F

from kvlib.core.method import Budgeted, Evictor, register, require, whole
from kvlib.core.recorded import steady
from kvlib.core.rotary import Rotary, rotaries, rotation
from kvlib.core.support import attention_modules


@register("full")
class Full(Budgeted):
    """Nothing is evicted.

    Raises:
        ValueError: for any budget but 1.0.
    """

    def __post_init__(self):
        everything = isinstance(self.budget, float) and self.budget == 1.0
        require("budget", self.budget, everything, "the full cache keeps all, 1.0")


@register("random")
class Random(Evictor):
    """Random tokens: the control that any score has to beat.

    The order is a hash of (seed, layer, head, position), so that neither padding nor chunks nor other rows change it.
    """

    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        require(
            "seed",
            self.seed,
            whole(self.seed, 0) and self.seed < 2**19,
            "a whole number in [0, 2**19), what the hash has room for",
        )

    def score(self, view):
        heads = torch.arange(view.lengths.shape[1], device=view.key.device)[:, None]
        x = view.positions.long() + (heads << 24) + (view.layer_idx << 34) + (self.seed << 44)
        for shift in (30, 27, 31):  # the finaliser of splitmix64, which spreads every input bit over all output bits
            x = (x ^ (x >> shift)) * -0x40A7B892E31B1A47
        return (x >> 40).float()


@register("streaming_llm")
class StreamingLLM(Evictor):
    """Attention sinks and a recent window (Xiong et al., 2309.17453), evicting at every decode step.

    The first `sinks` tokens and the last `budget - sinks` stay. With `renumber` (the paper's method) they are read as
    if they stood next to each other. Rotary attention sees nothing but distances, and between tokens of the recent
    window and the query these are what they were; so the sinks alone move, up to the window, each time by as many
    positions as tokens were evicted, always from the key as it came. Without `renumber` tokens keep their original
    positions. `run.kept` reports original indices in both cases. Keys turn as the model itself turns them, and not at
    all in layers whose keys do not depend on the position.
    A budget of b leaves at most b - 1 sinks. A prompt is read in full before anything is evicted, unless it is read in
    chunks, exceeds the model's window, and `renumber` is on: then what was read gives way to the next chunk.

    Raises:
        ValueError: with `renumber`, on models whose rotation is not known (`kvlib.core.rotary`); for sinks < 0.
    """

    sinks: int = 4
    renumber: bool = True
    evicts_in_decode = True

    def __post_init__(self):
        super().__post_init__()
        require("sinks", self.sinks, whole(self.sinks, 0), "a number of tokens >= 0")

    def first(self, view):
        return view.clamp("sinks", self.sinks, 0, self.budgets(view) - 1)

    def score(self, view):
        return view.protect(view.positions.float(), first=view.per_prompt("sinks", self.first))

    def prepare(self, model):
        return rotaries(model) if self.renumber and self.evicts else None

    def encode(self, run, layer, key, value, positions):
        note_first(run, layer, key, positions, self.sinks)
        return super().encode(run, layer, key, value, positions)

    def attend(self, view):
        move_first(view, self.sinks)
        return super().attend(view)


def turns(run, layer_idx: int) -> Rotary | None:
    """The layer's rotation, None if its keys stay as they are."""
    return run.prepared and run.prepared[layer_idx]


def note_first(run, layer, key, positions, count: int) -> None:
    """Put the keys of the row's first tokens into `rows["first"]`, by their positions, when they arrive."""
    step = run.step
    if turns(run, layer.index) is None or not bool((step.tokens - step.counts < count).any()):
        return
    arrived = positions[:, :, None] == torch.arange(count, device=key.device)  # (batch, new, count)
    key = key.to(torch.promote_types(key.dtype, torch.float32))
    old = layer.rows.get("first", torch.zeros((), device=key.device))
    fresh = arrived.mT[:, None].to(key.dtype) @ key
    layer.rows["first"] = fresh.where(arrived.any(1)[:, None, :, None], old)


def move_first(view, count: int) -> None:
    """Rotate the row's first tokens, which stand in the first slots, up to what is left of those behind them."""
    rotary = turns(view.run, view.layer_idx)
    if rotary is None or not (count and view.incomplete):
        return
    turn = view.step.shared.get(rotary)
    if turn is None:
        missing = view.step.ends - view.on_device(view.lengths[:, 0])  # the same for every head
        turn = view.step.shared[rotary] = rotation(missing, rotary, view.key.shape[-1])[:, None]
    notes, place, first = view.run.cache.notes, ("first", view.layer_idx), view.key[:, :, :count]
    unmoved = notes.get(place)
    if unmoved is None:  # the first one that is missing ends the row's first tokens
        at = view.positions[..., :count]
        unmoved = (at == torch.arange(at.shape[-1], device=at.device)).cummin(-1).values[..., None]
        if view.step.decoding and bool((view.lengths < view.tokens[:, None]).all()):
            notes[place] = unmoved  # until the next prompt they stay what they are
    came = view.layer.rows["first"][:, :, : first.shape[2]]
    turned = (came @ turn.to(came)).to(first.dtype)
    first.copy_(turned.where(unmoved, first))  # in the store, if segments are equal


@register("h2o")
class H2O(Evictor):
    """Heavy hitters and a recent window (Zhang et al., 2306.14048), evicting at every decode step.

    Score: attention received from every query so far, summed over the query heads of a group. Half of the budget is
    the recent window, the other half the highest scores outside it: int(budget / 2 x prompt) each, or, for a whole
    number b, b // 2 recent and the rest heavy. The window is the last `recent` stored tokens; the next query sees
    these, the heavy ones and itself.

    Follows the mask-based code in the form of the VATP authors (recent = heavy ratio). Departures: sums per row of the
    batch (theirs run over the batch) and in float32; at least one recent and one heavy token (with none the code
    prunes nothing); budget 1.0 never evicts (theirs holds the prompt length while decoding).
    """

    evicts_in_decode = True
    weighs = True

    def __post_init__(self):
        super().__post_init__()
        enough = isinstance(self.budget, float) or self.budget >= 2
        require("budget", self.budget, enough, "room for a heavy and a recent token, >= 2")

    def observe(self, view):
        view.accumulate("attention", view.importance().sum(2))

    def budgets(self, view):
        if isinstance(self.budget, int):
            return super().budgets(view)
        return 2 * self.tokens(view, self.budget / 2)[:, None].expand_as(view.lengths)

    def recent(self, view):
        return self.budgets(view) // 2

    def score(self, view):
        return view.protect(view.state["attention"], last=view.per_prompt("recent", self.recent))


@register("scissorhands")
class Scissorhands(H2O):
    """Persistence of importance (Liu et al., 2305.17118), in the simplified form of the VATP authors (2406.12335).

    Score: attention from the prompt's last 400 queries, divided by 400 however few they are, plus, with weight 1, that
    from every query since, of decoded tokens or of a question about a document; summed over the query heads of a group.
    The last 10 tokens stay, the other 2 x int(budget / 2 x prompt) - 10 (of a whole number b: b - 10) are the highest
    scores outside them. As in H2O the next query sees all of these and itself, and eviction goes on at every decode
    step.

    This is their code and not the paper, which counts how often a token falls below average attention. Departures from
    the code: sums per row of the batch, in float32; of budgets of less than 11 tokens one is heavy (theirs fails below
    10, and at 10 keeps the recent ones only); a second turn, which it has not, is judged by its own last 400 queries.
    """

    window = 400

    def observe(self, view):
        if view.step.ends_prompt:
            view.state["attention"] = view.importance(last=self.window).sum(2) / self.window
        elif view.step.after_prompt:
            super().observe(view)

    def recent(self, view):
        return view.clamp("recent", 10, 1, self.budgets(view) - 1)


@register("snapkv")
class SnapKV(Evictor):
    """What the end of the prompt looks at (Li et al., 2404.14469).

    Score: softmax attention of the last `window` queries over all keys, averaged over them and over the query heads of
    a group, pooled over `kernel` neighbouring tokens. The window itself stays and counts in the budget.
    Defaults are those of the paper's LongBench runs (window 32, kernel 7, max pooling).
    Departures: the average over the group comes after the softmax and before pooling, one set per KV head (the code
    repeats keys and keeps one set per query head); prompts of any length are compressed; the window takes at most half
    of the budget.

    Raises:
        ValueError: for a window < 1, an even kernel, or pooling other than "max" and "avg".
    """

    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self):
        super().__post_init__()
        require("window", self.window, whole(self.window, 1), "a number of queries >= 1")
        require("kernel", self.kernel, whole(self.kernel, 1) and self.kernel % 2 == 1, "an odd number of tokens")
        require("pooling", self.pooling, self.pooling in ("max", "avg"), "'max' or 'avg'")

    def recent(self, view):
        return view.clamp("window", self.window, 1, self.tokens(view, self.budget) // 2)

    def score(self, view):
        window = self.recent(view)
        attention = view.importance(last=window).mean(2)
        outside = ~view.protect(torch.zeros_like(attention), last=window).isinf()
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        pooled = pool(attention * outside, self.kernel, stride=1, padding=self.kernel // 2)
        return view.protect(pooled, last=window)


@register("pyramidkv")
class PyramidKV(SnapKV):
    """SnapKV with more tokens in early layers than in late ones (Cai et al., 2406.02069).

    Beside its window w, layer l of L keeps most - l x (most - least) / (L - 1) tokens, where least =
    (budget - w) // beta and most = 2 (budget - w) - least; if the prompt has no `most` tokens before its window, it
    keeps them all in layer 0, and least gives way. Prompts shorter than 2 (budget - w) get the budget in every layer.

    Defaults are SnapKV's, beta is that of the code. Departures: as in SnapKV; `budget` is the mean over layers, window
    included, a share of the prompt or a number (theirs is a number); and the mean is met exactly. In the code the step
    between layers is rounded down, so that the mean exceeds the budget by up to (L - 1) / 2 tokens, and kvpress rounds
    every layer by itself. Here distances from the mean are rounded towards 0, which as many layers have above it as
    below, and the last layer keeps `least`.

    Raises:
        ValueError: for a beta < 1, and what SnapKV refuses.
    """

    beta: int = 20

    def __post_init__(self):
        super().__post_init__()
        require("beta", self.beta, whole(self.beta, 1), "a whole number >= 1")

    def budgets(self, view):
        window, last = self.recent(view), max(1, len(view.run.modules) - 1)
        mean, before = self.tokens(view, self.budget) - window, view.prompt_tokens - window
        most = torch.minimum(2 * mean - mean // self.beta, before)
        above = torch.div((most - mean) * (last - 2 * view.layer_idx), last, rounding_mode="trunc")
        above = above.where(view.prompt_tokens >= 2 * mean, 0) if len(view.run.modules) > 1 else 0
        return (window + mean + above)[:, None].expand_as(view.lengths)


@register("tova")
class TOVA(Evictor):
    """What the last query looks at (Oren et al., 2401.06104), evicting at every decode step.

    Score: softmax attention of the last query, averaged over all heads of the layer, so that all heads keep the same
    tokens. Neither sinks nor recent tokens are protected: even the newest may go.
    """

    window = 1
    evicts_in_decode = True
    weighs = True

    def score(self, view):
        return view.column_sums(last=1).mean((1, 2))[:, None].expand_as(view.positions)


@register("knorm")
class KNorm(Evictor):
    """Keys of small norm attract attention (Devoto et al., 2406.11430): keep the tokens with the lowest ||k||_2.

    The authors compress all layers or leave some alone: the code's library skips none, its command line layer 0, its
    README layers 0 and 1, its needle scripts layers 0, 1 and 12. kvpress skips none, as we do by default. A layer in
    `skip_layers` keeps everything, and no other one makes up for it: what is stored is more than the budget, so that
    methods have to be compared at equal `run.stored_bytes()`.

    Args:
        skip_layers: layers that are not compressed.
        recent: how many of the newest tokens stay whatever their norm, at most all but one of the budget (ours: the
            authors protect none).

    Raises:
        ValueError: for a layer that the model has not.
    """

    skip_layers: tuple[int, ...] = ()
    recent: int = 0

    def __post_init__(self):
        super().__post_init__()
        numbers = isinstance(self.skip_layers, tuple) and all(whole(layer, 0) for layer in self.skip_layers)
        require("skip_layers", self.skip_layers, numbers, "a tuple of layers, counted from 0")
        require("recent", self.recent, whole(self.recent, 0), "a number of tokens >= 0")

    def prepare(self, model):
        layers = len(attention_modules(model))
        require("skip_layers", self.skip_layers, max(self.skip_layers, default=-1) < layers, f"of {layers} layers")

    def budgets(self, view):
        skipped = view.layer_idx in self.skip_layers
        return view.prompt_tokens[:, None].expand_as(view.lengths) if skipped else super().budgets(view)

    def score(self, view):
        dtype = torch.promote_types(view.key.dtype, torch.float32)
        recent = view.clamp("recent", self.recent, 0, self.tokens(view, self.budget) - 1)
        return view.protect(-torch.linalg.vector_norm(view.key, dim=-1, dtype=dtype), last=recent)


steady(StreamingLLM, H2O, Scissorhands, TOVA)
