"""AnchorCoder: of every line of code its anchor stays (Zhang et al., 2411.06680)."""

from dataclasses import replace
from typing import NamedTuple

import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from kvlib.core import attention
from kvlib.core.method import Method, register, require, whole
from kvlib.core.rotary import Rotary, rotaries, rotate
from kvlib.core.support import attention_modules, kv_heads
from kvlib.methods.anchors import lines, moves, visible

SETTINGS = "anchorcoder"  # in the configuration of a checkpoint that was trained for it


class Prepared(NamedTuple):
    """What a checkpoint says, or the arguments; how layers turn their keys; and the id of BOS, which is a mark, too."""

    settings: "AnchorCoder"
    rotary: list[Rotary | None]
    bos: int | None


class Lines(NamedTuple):
    """Of the tokens of a pass, `(batch, new)`: which are marked, and where their lines begin.

    following: `(batch,)`, where the line of the next token begins. moves: as `kvlib.methods.anchors.moves` gives them.
    ended: was any token marked?
    """

    marked: torch.Tensor
    begins: torch.Tensor
    following: torch.Tensor
    moves: torch.Tensor | None
    ended: bool


@register("anchorcoder")
class AnchorCoder(Method):
    """Anchors behind every line, to which later lines attend instead of the line; for models that were trained so.

    *Layers.* Each layer whose number is a multiple of `per` is full; with `per=None` none is. In the others a token
    sees the anchors of all earlier lines and its own line so far (TAA). What no later token can see there is freed, at
    the end of every pass.

    *Positions.* Each KV head sees an anchor's key at the place of one of the line's tokens, most heads at its last ones
    (MHPE, `spread`). Everything else stays where it is.

    *A second layer.* Layers behind `beyond` attend to what layer `source` has stored as well, in one softmax, under
    their own mask (LAA); nothing more is stored for it. Of a source that forgets itself a full layer, too, sees marks
    and the own line alone; in the release such a source would have to keep everything.

    Follows NUAAZXY/Anchor_Coder ac7bfd1, with the departures of `kvlib.methods.anchors`. There what a prompt says
    behind its last anchor is lost to all but full layers; here prompts, chunks of them and decoded tokens give the
    logits of the mask with which the model was trained. The anchors are stored, and count.

    Args:
        anchor: id of the token; None: everything but `forced` is as the checkpoint says, in `config.anchorcoder`.
        ends: ids of the tokens that end a line. per. source, beyond: layers, or None for no second layer. spread.
        longest: tokens of a line that get an anchor of their own where they are generated; None: no limit.
        forced: `generate` plants anchors, where lines end and nowhere else; otherwise the model has to.

    Raises:
        ValueError: for per < 1, for one of `source` and `beyond` without the other, for layers that the model has not;
            for a checkpoint without such settings; for embeddings in place of token ids; for models whose rotation is
            not known.
    """

    anchor: int | None = None
    ends: tuple[int, ...] = ()
    per: int | None = 4
    source: int | None = None
    beyond: int | None = None
    spread: bool = True
    longest: int | None = None
    forced: bool = True
    own_prefill = True

    def __post_init__(self):
        require("anchor", self.anchor, self.anchor is None or whole(self.anchor, 0), "the id of a token, or None")
        fits = self.per is None or whole(self.per, 1)
        require("per", self.per, fits, "every which layer is full, a number >= 1, or None for no layer")
        require("longest", self.longest, self.longest is None or whole(self.longest, 1), "tokens >= 1, or None")
        together = (self.source is None) == (self.beyond is None)
        require("source", self.source, together, f"a layer, if and only if beyond={self.beyond} is one")
        ordered = self.source is None or (whole(self.source, 0) and whole(self.beyond, self.source))
        require("beyond", self.beyond, ordered, f"a layer >= source={self.source}")
        require("ends", self.ends, self.anchor not in self.ends, "an anchor does not end a line by itself")

    @property
    def evicts(self) -> bool:
        return self.per != 1

    def full(self, layer_idx: int) -> bool:
        """Does this layer keep everything?"""
        return self.per is not None and layer_idx % self.per == 0

    # Once per block

    def prepare(self, model):
        config, layers, settings = model.config.get_text_config(), len(attention_modules(model)), self
        if self.anchor is None:
            found = getattr(config, SETTINGS, None)
            require("anchor", None, found is not None, f"{type(model).__name__} was not trained for it: no {SETTINGS}")
            settings = replace(self, **{**found, "ends": tuple(found["ends"]), "forced": self.forced})
        require("beyond", settings.beyond, (settings.beyond or 0) < layers, f"of {layers} layers")
        return Prepared(settings, rotaries(model) if settings.spread else [None] * layers, config.bos_token_id)

    def on_generate(self, run, arguments):
        settings = run.prepared.settings
        if not settings.forced:
            return arguments
        given = arguments.get("logits_processor") or []
        return arguments | {"logits_processor": LogitsProcessorList([*given, Forced(run)])}

    # Every pass

    def on_token_ids(self, run, token_ids):
        if token_ids is None:
            raise ValueError("anchors are found by their token ids; the model was given embeddings")
        step, (settings, _, bos), rows = run.step, run.prepared, run.cache.layers[0].rows
        positions = step.positions.to(token_ids.device)
        marked = marks(token_ids, settings.anchor, bos)
        begin = rows.get("begin", positions.new_zeros(len(positions)))
        begins, following = lines(marked, positions, begin)
        ended = bool(marked.any())
        turned = moves(marked, positions, begins, kv_heads(run.model)) if settings.spread and ended else None
        step.shared["lines"] = Lines(marked, begins, following, turned, ended)
        rows["begin"] = following

    def encode(self, run, layer, key, value, positions):
        rotary, found = run.prepared.rotary[layer.index], run.step.shared["lines"]
        if rotary is not None and found.moves is not None:
            key = rotate(key, found.moves.to(key.device), rotary)  # by 0 positions a key stays what it is, to the bit
        return super().encode(run, layer, key, value, positions)

    def attend(self, view):
        return attention.attend(*self.read(view))

    def read(self, view):
        """What a layer attends to: its view, with a second layer's entries behind its own if it has one, and which of
        them are seen, `(batch, 1, new, slots)`; None: whatever stands before a query."""
        settings, found = view.run.prepared.settings, view.step.shared["lines"]
        view.remember("marked", found.marked[:, None, :, None].expand(-1, view.lengths.shape[1], -1, -1).float())
        full = settings.full(view.layer_idx)
        if settings.beyond is not None and view.layer_idx > settings.beyond:
            source = view.other(settings.source)
            seen = [sees(view, full), sees(source, full and settings.full(settings.source))]
            pairs = ((getattr(view, name), getattr(source, name)) for name in ("key", "value", "positions"))
            key, value, positions = (torch.cat(pair, dim=2) for pair in pairs)
            return view.replaced(key=key, value=value, positions=positions), torch.cat(seen, dim=-1)
        if full or view.step.decoding:  # a decoded token sees all that is left
            return view, None
        return view, sees(view, full)

    def finish(self, run):
        """Free what no later token sees, behind all layers: one may read another that forgets."""
        settings, found = run.prepared.settings, run.step.shared["lines"]
        if run.step.decoding and not found.ended:
            return
        for index in range(len(run.cache.layers)):
            if not settings.full(index):
                view = run.view(index)
                at = view.positions
                stays = (view.state["marked"][..., 0] > 0) | (at == 0) | (at >= view.per_row(found.following))
                stays &= at >= 0
                view.layer.keep(stays, stays.sum(-1).cpu())


def marks(token_ids: torch.Tensor, anchor: int, bos: int | None) -> torch.Tensor:
    """Which tokens end a line: anchors and BOS. Padding may be among them, which stands nowhere."""
    return token_ids == anchor if bos is None else (token_ids == anchor) | (token_ids == bos)


def sees(view, full: bool) -> torch.Tensor:
    """Which stored tokens the view's queries see, `(batch, 1, new, slots)`: all heads store the same ones."""
    at, queries = view.positions[:, 0], view.query_positions
    if full:
        seen = (at[:, None] >= 0) & (at[:, None] <= queries[:, :, None])
    else:
        begins = view.step.shared["lines"].begins.to(view.device)
        seen = visible(at, view.state["marked"][:, 0, :, 0] > 0, queries, begins)
    return (seen | (queries < 0)[:, :, None])[:, None]  # padding sees all: an empty softmax would be NaN


class Forced(LogitsProcessor):
    """An anchor where a line has ended, or has become too long, and nowhere else.

    The run says how many of the ids are no padding.
    """

    def __init__(self, run):
        self.run = run

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        settings = self.run.prepared.settings
        ends = torch.tensor(settings.ends, device=input_ids.device, dtype=input_ids.dtype)
        due = torch.isin(input_ids[:, -1], ends)
        if settings.longest is not None:
            line = input_ids[:, -settings.longest :]
            real = self.run.cache.tokens.to(due.device) >= settings.longest
            due |= real & (line.shape[1] == settings.longest) & (line != settings.anchor).all(1)
        scores = scores.clone()
        scores[:, settings.anchor] = torch.where(due, 0.0, -torch.inf)
        others = torch.arange(scores.shape[1], device=scores.device) != settings.anchor
        return scores.masked_fill(due[:, None] & others, -torch.inf)
