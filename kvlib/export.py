"""What a method keeps of a prompt, as a small file that a serving engine can read, and a method that replays it.

    with kvlib.method("snapkv", budget=0.2)(model) as run:
        run.read(**inputs)
        KeptSet.of(run).save("kept.safetensors")
    with Replay(KeptSet.load("kept.safetensors"))(model) as run:
        run.read(**inputs)

docs/serving.md describes the file and reads it without kvlib.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from kvlib.core.method import Method
from kvlib.methods.baselines import StreamingLLM
from kvlib.methods.systems.elastic_cache import ElasticCache

FORMAT, VERSION = "kvlib.kept", "1"


@dataclass(frozen=True, eq=False)
class KeptSet:
    """Which tokens of each prompt every layer and KV head keeps, once the prompts have been read and compressed.

    Attributes (tensors are int32 on the CPU):
        ids: `(tokens,)`, the prompts' token ids, row after row, without padding: a kept set means nothing on another
            text, and ids, unlike a digest, tell an engine which text and a reader where another one differs.
        lengths: `(rows,)`, tokens of each prompt.
        counts: one `(rows, kv_heads)` a layer, tokens that are kept: the budget of each head.
        positions: one `(counts.sum(),)` a layer: row after row and in it head after head, ascending, 0 = the row's
            first real token, whatever padding stood before it. Keys are rotated to these positions, not renumbered.
        model: what the model has to have: its type, its numbers of layers, heads and channels, its rotation.
        method, arguments: the method's name, and what it was made with.

    Raises:
        ValueError: if these do not fit together.
    """

    ids: torch.Tensor = field(repr=False)
    lengths: torch.Tensor = field(repr=False)
    counts: list[torch.Tensor] = field(repr=False)
    positions: list[torch.Tensor] = field(repr=False)
    model: dict
    method: str
    arguments: dict

    def __post_init__(self):
        fits = len(self.ids) == self.lengths.sum() and len(self.counts) == len(self.positions)
        if not (fits and all(map(self._fits, range(len(self.counts))))):
            raise ValueError("the kept sets are damaged: lengths, counts and positions do not fit together")

    def _fits(self, layer: int) -> bool:
        """Are a layer's positions as many as its counts say, ascending in each head, and inside of the prompt?"""
        counts, positions = self.counts[layer], self.positions[layer]
        if counts.ndim != 2 or len(counts) != len(self.lengths) or bool((counts < 0).any()):
            return False
        if len(positions) != counts.sum():
            return False
        ends = self.lengths.repeat_interleave(counts.sum(1))
        inside = bool(((positions >= 0) & (positions < ends)).all())
        return inside and bool((self.places(layer).diff() > 0).all())

    def places(self, layer: int) -> torch.Tensor:
        """Where what a layer keeps stands in a flattened `(rows, kv_heads, tokens of the longest prompt)`."""
        counts = self.counts[layer].flatten()
        return torch.arange(len(counts)).repeat_interleave(counts) * int(self.lengths.max()) + self.positions[layer]

    @classmethod
    def of(cls, run) -> "KeptSet":
        """What `run.read` has left; questions asked since change nothing.

        Raises:
            RuntimeError: if no document was read.
            ValueError: for methods whose cache is more than a choice of tokens, and for embeddings in place of ids.
        """
        if reason := refusal(run.method):
            raise ValueError(f"{run.method!r} cannot be exported: {reason}")
        cache = run.document
        if cache is None:
            raise RuntimeError("there is nothing to export: call `run.read` first")
        ids = cache.ids.cpu()
        ids = ids[torch.arange(ids.shape[1]) < cache.tokens[:, None]]
        if bool((ids < 0).any()):
            raise ValueError("embeddings were passed in place of ids, so that the file could not name its prompt")
        layers = [layer.position_rectangle().cpu() for layer in cache.layers]  # after a prompt in text order
        arguments = {f.name: getattr(run.method, f.name) for f in dataclasses.fields(run.method)}
        return cls(
            ids=ids,
            lengths=cache.tokens.int(),
            counts=[(layer >= 0).sum(-1).int() for layer in layers],
            positions=[layer[layer >= 0] for layer in layers],
            model=identity(run.model),
            method=getattr(run.method, "name", type(run.method).__name__),
            arguments=json.loads(json.dumps(arguments, default=repr)),
        )

    def save(self, path: str | Path) -> None:
        """Write the file, in place of one that may be there."""
        tensors = {"prompt.ids": self.ids, "prompt.lengths": self.lengths}
        for layer, (counts, positions) in enumerate(zip(self.counts, self.positions, strict=True)):
            tensors |= {f"layer.{layer}.counts": counts, f"layer.{layer}.positions": positions}
        told = {"model": json.dumps(self.model), "method": self.method, "arguments": json.dumps(self.arguments)}
        told |= {"format": FORMAT, "version": VERSION, "positions": "original"}
        Path(path).write_bytes(save(tensors, told))

    @classmethod
    def load(cls, path: str | Path) -> "KeptSet":
        """Read a file.

        Raises:
            ValueError: if it is damaged, or not of this format and version.
            OSError: if there is none.
        """
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or not all of one: {error}") from None
        found = told.get("format"), told.get("version")
        if found != (FORMAT, VERSION):
            raise ValueError(f"{path} has format and version {found}, this reader knows {(FORMAT, VERSION)}")
        try:
            model = json.loads(told["model"])
            return cls(
                ids=tensors["prompt.ids"],
                lengths=tensors["prompt.lengths"],
                counts=[tensors[f"layer.{layer}.counts"] for layer in range(model["layers"])],
                positions=[tensors[f"layer.{layer}.positions"] for layer in range(model["layers"])],
                model=model,
                method=told["method"],
                arguments=json.loads(told["arguments"]),
            )
        except KeyError as missing:
            raise ValueError(f"{path} is damaged: it lacks {missing}") from None


@dataclass(frozen=True)
class Replay(Method):
    """Keeps of its prompts what a `KeptSet` says, and all that comes later.

    It stands for the method at the end of the prompt: what that one evicts while decoding stays here. Rows have to come
    in the order in which they were exported; their padding may be another. Questions (`Run.ask`) can be asked; a
    later prompt into the same cache is another text, and refused. Not registered: it has no defaults to run with.

    Raises:
        ValueError: for a model of another kind, when the block is entered, and for other prompts, before anything is
            evicted. Other weights of the same kind are not told apart.
    """

    kept: KeptSet

    @property
    def evicts(self) -> bool:
        return True

    def prepare(self, model):
        found = identity(model)
        for name, value in self.kept.model.items():
            if found.get(name) != value:
                raise ValueError(f"the kept sets are of a model with {name} {value!r}, here it is {found.get(name)!r}")

    def compress(self, view):
        if view.layer_idx == 0:
            self._check(view)
        counts = self.kept.counts[view.layer_idx].long()
        longest = int(self.kept.lengths.max())
        stays = torch.zeros(counts.numel() * longest, dtype=torch.bool)
        stays[self.kept.places(view.layer_idx)] = True
        at = view.positions.long().clamp(min=0)  # of empty slots `keep` asks nothing
        view.layer.keep(stays.view(*counts.shape, longest).to(at.device).gather(-1, at), counts)

    def _check(self, view) -> None:
        """Raise ValueError if the prompts are not those of the kept sets."""
        read = [ids[:tokens] for ids, tokens in zip(view.run.cache.ids.cpu(), view.tokens.tolist())]
        known = self.kept.ids.split(self.kept.lengths.tolist())
        if len(read) != len(known):
            raise ValueError(f"the kept sets are of {len(known)} prompts, and {len(read)} were read")
        for row, (now, then) in enumerate(zip(read, known)):
            if not torch.equal(now, then):
                raise ValueError(
                    f"the kept sets are of other prompts: row {row} has {len(now)} tokens, of which the first "
                    f"{int((now[: len(then)] == then[: len(now)]).int().cumprod(0).sum())} are those of its {len(then)}"
                )


def refusal(method: Method) -> str | None:
    """Why what a method stores is more than a choice of tokens, None if it is not."""
    if method.own_prefill or method.hooks("before_layer"):
        return "it reads the prompt in another way than the model does"
    if method.renumber and method.evicts:
        return "it reads tokens at other positions than those they had in the prompt (try renumber=False)"
    if method.hooks("decode") or isinstance(method, ElasticCache):
        return "what it stores of a token is not the key and value that the model has computed"
    if method.hooks("attend") and not isinstance(method, StreamingLLM):  # which without `renumber` attends as all do
        return "it reads other things than all tokens that are kept"
    return None


def identity(model) -> dict:
    """What has to be the same for kept sets to mean the same, as JSON gives it back."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    found = {
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "query_heads": heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocabulary": config.vocab_size,
        "rotation": getattr(config, "rope_parameters", None),
    }
    return json.loads(json.dumps(found))
