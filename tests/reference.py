"""The baselines as an executable specification: float64, one token, one head, one key at a time.

Nothing here is shared with `kvlib`. A `Decoder` reads one token after the other; every (layer, KV head) has a `Head`
that lists what it stores. A *policy* looks at one `Head` and returns the positions that stay. `simulate` reads a
prompt, lets the policy evict, and decodes greedily.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 97


# A model to run it on


class ExactRotary(torch.nn.Module):
    """Rotary angles in float64, with the attributes of the transformers module that it replaces."""

    rope_type = "default"

    def __init__(self, theta, head_dim):
        super().__init__()
        self.inv_freq = torch.tensor([theta ** (-2 * j / head_dim) for j in range(head_dim // 2)], dtype=torch.float64)

    def forward(self, x, position_ids):
        angle = (position_ids[..., None] * self.inv_freq).repeat(1, 1, 2)
        return angle.cos(), angle.sin()


def tiny_llama(kv_heads, layers=2, seed=0):
    """A random Llama with four query heads, peaked enough for attention and norms to differ between tokens.

    transformers rounds norms and rotary angles to float32 even if the weights are float64. Both are replaced, so that
    agreement to 1e-9 can be asked for.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=128,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).double().eval()
    random = torch.Generator().manual_seed(seed)
    model.model.rotary_emb = ExactRotary(10000.0, config.head_dim)
    for block in [*model.model.layers, model.model]:
        for name in [name for name, _ in block.named_children()]:
            if name.endswith("norm"):
                setattr(block, name, torch.nn.RMSNorm(32, eps=config.rms_norm_eps, dtype=torch.float64))
                block.get_submodule(name).weight.data.uniform_(0.5, 1.5, generator=random)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            gain = 2.5 if "q_proj" in name or "k_proj" in name else 1.0
            weight.data.normal_(0, gain / math.sqrt(weight.shape[1]), generator=random)
    return model.requires_grad_(False)


# The decoder


@dataclass
class Head:
    """One KV head of one layer.

    Attributes:
        stored: positions that are in the cache, ascending.
        keys, values: position -> vector, keys before rotation.
        queries: (query head, position) -> rotated query.
        attention: (query head, position of the query) -> {position of the key: weight}, for everything that was read.
        outputs: (query head, position of the query) -> what attention gave it.
        projections: query head -> its columns of the output projection.
        norms: whatever has been computed of a value already.
        tokens, prompt: tokens read so far, and how many of them are the prompt.
        rotated: position -> rotated key as attention has last used it.
        neighbours: all heads of the layer, this one included. layers: how many layers there are.
    """

    layer: int
    index: int
    query_heads: list
    stored: list = field(default_factory=list)
    keys: dict = field(default_factory=dict)
    values: dict = field(default_factory=dict)
    queries: dict = field(default_factory=dict)
    attention: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)
    projections: dict = field(default_factory=dict)
    norms: dict = field(default_factory=dict)
    rotated: dict = field(default_factory=dict)
    tokens: int = 0
    prompt: int = 0
    neighbours: list = field(default_factory=list)
    layers: int = 0


class Decoder:
    """A Llama that reads one token at a time.

    Args:
        renumber: keys are rotated to their rank among the stored tokens, anew for every query, as StreamingLLM does.
    """

    def __init__(self, model, renumber=False):
        self.config, self.renumber = model.config, renumber
        self.weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        self.heads = [
            [Head(layer, h, list(range(h * group, h * group + group))) for h in range(self.config.num_key_value_heads)]
            for layer in range(self.config.num_hidden_layers)
        ]
        for layer in self.heads:
            for head in layer:
                head.neighbours, head.layers = layer, len(self.heads)

    def read(self, token, position):
        """Logits after one more token."""
        x = self.weights["model.embed_tokens.weight"][token]
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            x = x + self.attend(layer, self.norm(x, prefix + "input_layernorm.weight"), position)
            y = self.norm(x, prefix + "post_attention_layernorm.weight")
            gate = self.weights[prefix + "mlp.gate_proj.weight"] @ y
            up = self.weights[prefix + "mlp.up_proj.weight"] @ y
            x = x + self.weights[prefix + "mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        return self.weights["lm_head.weight"] @ self.norm(x, "model.norm.weight")

    def norm(self, x, name):
        return x / math.sqrt(sum(x * x) / len(x) + self.config.rms_norm_eps) * self.weights[name]

    def attend(self, layer, x, position):
        """Store the token in every head of the layer, then let every query head look at what is stored."""
        dim = self.config.head_dim
        q, k, v, o = (self.weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo")
        outputs = {}
        for head in self.heads[layer]:
            rows = slice(head.index * dim, head.index * dim + dim)
            head.keys[position], head.values[position] = k[rows] @ x, v[rows] @ x
            head.stored.append(position)
            head.tokens += 1
            for rank, at in enumerate(head.stored):
                head.rotated[at] = self.rotate(head.keys[at], rank if self.renumber else at)
            own = len(head.stored) - 1 if self.renumber else position
            for h in head.query_heads:
                query = self.rotate(q[h * dim : h * dim + dim] @ x, own)
                logits = {at: query @ head.rotated[at] / math.sqrt(dim) for at in head.stored}
                weights = {at: math.exp(logits[at] - max(logits.values())) for at in head.stored}
                total = sum(weights.values())
                weights = {at: weights[at] / total for at in head.stored}
                head.queries[h, position], head.attention[h, position] = query, weights
                outputs[h] = sum(weights[at] * head.values[at] for at in head.stored)
                head.outputs[h, position], head.projections[h] = outputs[h], o[:, h * dim : h * dim + dim]
        return o @ np.concatenate([outputs[h] for h in sorted(outputs)])

    def rotate(self, x, position):
        half = len(x) // 2
        angle = np.array([position * 10000.0 ** (-2 * j / len(x)) for j in range(half)])
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


@dataclass
class Trace:
    """What `simulate` saw after the prompt (entry 0) and after each decoded token.

    Attributes:
        logits: per step, of the last token. ids: per step, its argmax, the token read in the next step.
        kept: per step and layer, for every head the positions still stored, after eviction.
        visible: per step and layer, for every head how many keys the last query saw.
    """

    logits: list = field(default_factory=list)
    ids: list = field(default_factory=list)
    kept: list = field(default_factory=list)
    visible: list = field(default_factory=list)


def simulate(model, prompt, steps, policy=None):
    """Read the prompt, evict, then decode `steps` tokens, evicting after each if the policy says so."""
    decoder = Decoder(model, renumber=getattr(policy, "renumber", False))
    trace = Trace()
    for step in range(steps + 1):
        new = prompt if step == 0 else [trace.ids[-1]]
        for token in new:
            logits = decoder.read(token, decoder.heads[0][0].tokens)
        trace.visible.append([[len(head.stored) for head in layer] for layer in decoder.heads])
        for layer in decoder.heads:
            for head in layer:
                head.prompt = len(prompt)
                if policy is not None and (step == 0 or policy.evicts_in_decode):
                    head.stored = sorted(policy(head))
        trace.logits.append(logits)
        trace.ids.append(int(np.argmax(logits)))
        trace.kept.append([[list(head.stored) for head in layer] for layer in decoder.heads])
    return trace


# The policies


def count(share, prompt):
    """A whole number is tokens, a fraction is of the prompt, rounded down, at least one token."""
    return share if isinstance(share, int) else max(1, int(share * prompt))


def best(scores, number):
    """The positions with the highest scores, the earlier one first among equals."""
    return sorted(scores, key=lambda at: (-scores[at], at))[:number]


@dataclass
class Policy:
    budget: float | int
    evicts_in_decode = False


@dataclass
class Random(Policy):
    seed: int = 0

    def __call__(self, head):
        scores = {at: self.hash(head.layer, head.index, at) for at in head.stored}
        return best(scores, count(self.budget, head.prompt))

    def hash(self, layer, head, position):
        """Three rounds of shift, exclusive or, and multiplication in signed 64-bit arithmetic; the upper 24 bits."""
        x = position + head * 2**24 + layer * 2**34 + self.seed * 2**44
        for shift in (30, 27, 31):
            x = (x ^ (x >> shift)) * 0xBF58476D1CE4E5B9
            x = (x + 2**63) % 2**64 - 2**63
        return x >> 40


@dataclass
class StreamingLLM(Policy):
    sinks: int = 4
    renumber: bool = True
    evicts_in_decode = True

    def __call__(self, head):
        budget = count(self.budget, head.prompt)
        if len(head.stored) <= budget:
            return head.stored
        sinks = max(0, min(self.sinks, budget - 1))
        return head.stored[:sinks] + head.stored[len(head.stored) - (budget - sinks) :]


# What a key is worth to one query of one query head: attention, or something in its place


def attention(head, h, query, key):
    return head.attention.get((h, query), {}).get(key, 0.0)


def attention_by_norm(order):
    def worth(head, h, query, key):
        if key not in head.norms:
            head.norms[key] = np.linalg.norm(head.values[key], order)
        return attention(head, h, query, key) * head.norms[key]

    return worth


def eviction_error(head, h, query, key):
    """How far the query's output would move without the key."""
    weights = head.attention.get((h, query), {})
    if key not in weights or len(weights) < 2:
        return 0.0
    weight = min(weights[key], 1 - 1e-6)
    return weight / (1 - weight) * np.linalg.norm(head.outputs[h, query] - head.values[key])


def attention_by_output_norm(head, h, query, key):
    if (h, key) not in head.norms:
        head.norms[h, key] = sum(abs(head.projections[h] @ head.values[key]))
    return (attention(head, h, query, key) + 1e-4) * head.norms[h, key]


@dataclass
class Host(Policy):
    """Policies that weigh keys by what they are worth. The first `sinks` tokens come first, but for one place."""

    worth = staticmethod(attention)
    sinks = 0

    def received(self, head, queries, keys):
        """What each key is worth to all `queries`, in all query heads."""
        return {at: sum(self.worth(head, h, i, at) for h in head.query_heads for i in queries) for at in keys}

    def heaviest(self, scores, number):
        forced = [at for at in scores if at < min(self.sinks, number - 1)]
        return forced + best({at: scores[at] for at in scores if at not in forced}, number - len(forced))


@dataclass
class H2O(Host):
    evicts_in_decode = True

    def split(self, head):
        """Heavy and recent tokens."""
        if isinstance(self.budget, int):
            return self.budget - self.budget // 2, self.budget // 2
        return (count(self.budget / 2, head.prompt),) * 2

    def scores(self, head, keys):
        return self.received(head, range(head.tokens), keys)

    def __call__(self, head):
        heavy, recent = self.split(head)
        if len(head.stored) <= heavy + recent:
            return head.stored
        window = [at for at in head.stored if at >= head.tokens - recent]
        older = [at for at in head.stored if at not in window]
        return self.heaviest(self.scores(head, older), heavy) + window


@dataclass
class Scissorhands(H2O):
    def split(self, head):
        total = self.budget if isinstance(self.budget, int) else 2 * count(self.budget / 2, head.prompt)
        recent = min(10, total - 1)
        return total - recent, recent

    def scores(self, head, keys):
        """Queries before the first one, if the prompt has less than 400, look at nothing."""
        mean = self.received(head, range(head.prompt - 400, head.prompt), keys)
        later = self.received(head, range(head.prompt, head.tokens), keys)
        return {at: mean[at] / 400 + later[at] for at in keys}


@dataclass
class SnapKV(Host):
    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def split(self, head):
        """Tokens of the prompt before the window, and the window."""
        budget = count(self.budget, head.prompt)
        window = max(1, min(self.window, budget // 2))
        return budget - window, window

    def __call__(self, head):
        (before, window), n = self.split(head), head.prompt
        if n <= before + window:
            return head.stored
        scores = self.received(head, range(n - window, n), range(n - window))
        pooled = {}
        for at in range(n - window):
            first, last = at - self.kernel // 2, at + self.kernel // 2
            around = [scores[j] for j in range(first, last + 1) if 0 <= j < n - window]
            pooled[at] = max(around) if self.pooling == "max" else sum(around) / self.kernel
        return self.heaviest(pooled, before) + list(range(n - window, n))


@dataclass
class PyramidKV(SnapKV):
    beta: int = 20

    def split(self, head):
        mean, window = super().split(head)
        least = math.floor(mean / self.beta)
        most = 2 * mean - least
        if most >= head.prompt - window:
            most = head.prompt - window
            least = 2 * mean - most
        if head.prompt < 2 * mean:
            return mean, window
        exact = (
            Fraction(most) - head.layer * Fraction(most - least, max(1, head.layers - 1)) if head.layers > 1 else mean
        )
        return math.floor(exact) if exact > mean else math.ceil(exact), window


@dataclass
class TOVA(Policy):
    evicts_in_decode = True

    def __call__(self, head):
        looks = [each.attention[h, head.tokens - 1] for each in head.neighbours for h in each.query_heads]
        scores = {at: sum(weights[at] for weights in looks) / len(looks) for at in head.stored}
        return best(scores, count(self.budget, head.prompt))


@dataclass
class KNorm(Policy):
    skip_layers: tuple = ()
    recent: int = 0

    def __call__(self, head):
        number = count(self.budget, head.prompt)
        if head.layer in self.skip_layers or len(head.stored) <= number:
            return head.stored
        recent = head.stored[len(head.stored) - min(self.recent, number - 1) :]
        scores = {at: -math.sqrt(sum(head.rotated[at] ** 2)) for at in head.stored if at not in recent}
        return best(scores, number - len(recent)) + recent


POLICIES = {
    "random": Random,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "scissorhands": Scissorhands,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "tova": TOVA,
    "knorm": KNorm,
}
HOSTS = {name: policy for name, policy in POLICIES.items() if issubclass(policy, Host)}


def hosted(host, budget, worth, sinks):
    """A host that weighs by `worth`, its first `sinks` tokens forced."""
    policy = HOSTS[host](budget)
    policy.worth, policy.sinks = worth, sinks
    return policy
