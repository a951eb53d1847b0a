"""SubGen as its paper analyses it: attention estimated from samples (Zandieh et al., 2402.06082)."""

import torch

from kvlib.core import attention
from kvlib.core.method import Method, register, require, whole
from kvlib.methods.systems.chance import mixed, uniform

BEYOND = 100  # times the largest entry of a stored value: no estimate may be larger, or half precision would overflow


@register("subgen_sampled")
class SubGenSampled(Method):
    """Two samples of the text, from which numerator and denominator of attention are estimated apart.

    For the numerator `samples` slots: a new token takes each of them with probability |v|^2 / sum of |v|^2 so far. A
    token in m slots counts m sum |v|^2 / (samples |v|^2) times. For the denominator clusters of keys: a token joins the
    nearest representative if that is within `radius`, else it becomes one. A cluster of n tokens has `per` slots, each
    taken by a new member with probability 1 / n; a token in m of them counts m n / `per` times. Both estimates are
    right on average; their quotient, the output, is so only for many samples, and far off where a query is large.

    No code of the authors is known: the sampling rules are second hand, the estimators from memory, our reading.
    Departures: the prompt is read exactly and sampled at its end; a new token is attended to exactly, and sampled
    then; `radius` is in units of the mean norm of the head's keys at the end of the first prompt, since heads differ;
    a token that serves several purposes is stored once, and each has key and value, though the denominator needs keys
    alone; outputs a hundred times larger than any stored value, which no attention gives, are cut there. Chance is a
    hash of (seed, layer, head, position, slot). How many tokens are stored follows from the data, which costs a wait
    for the device at every step, so that steps cannot be captured; and there is no bound on the number of clusters.

    Args:
        samples: slots of the numerator. per: slots of each cluster.
        radius: of clusters; at 0 every key is one, so that the denominator is exact.

    Raises:
        ValueError: for samples < 1, radius < 0, per < 1, and a seed that is not in [0, 2**19).
    """

    samples: int = 64
    radius: float = 0.5
    per: int = 4
    seed: int = 0
    evicts_in_decode = True

    def __post_init__(self):
        require("samples", self.samples, whole(self.samples, 1), "a number of slots >= 1")
        size = isinstance(self.radius, int | float) and not isinstance(self.radius, bool) and self.radius >= 0
        require("radius", self.radius, size, "a number >= 0, in units of a key's norm")
        require("per", self.per, whole(self.per, 1), "a number of slots >= 1")
        require("seed", self.seed, whole(self.seed, 0) and self.seed < 2**19, "a whole number in [0, 2**19)")

    @property
    def evicts(self):
        return True

    def attend(self, view):
        if "leader" not in view.state:
            return super().attend(view)
        new, value, made = view.state["leader"] == 0, view.value.double(), []
        above, below = (view.state[name].masked_fill(new, 1)[:, :, None, None] for name in ("above", "below"))
        scaling = view.key.shape[-1] ** -0.5 if view.scaling is None else view.scaling
        for logits in attention.blocks(view.query, view.key, view.query_positions, view.positions, scaling, None):
            seen = logits.shape[-1]
            weights = (logits - logits.amax(-1, keepdim=True)).double().exp().nan_to_num_(0.0)  # padding sees nothing
            total = (weights * below[..., :seen]).sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            made.append((weights * above[..., :seen]) @ value[:, :, None, :seen] / total)
        most = value.abs().masked_fill((view.positions < 0)[..., None], 0).amax((2, 3))[:, :, None, None, None]
        most = (BEYOND * most).clamp(max=torch.finfo(view.query.dtype).max)
        return torch.cat(made, dim=3).clamp(-most, most).flatten(1, 2).transpose(1, 2).to(view.query.dtype)

    def compress(self, view):
        state, at = view.state, view.positions.long()
        leader = state.get("leader", torch.zeros_like(at))  # the slot of each one's representative, counted from 1
        new = (at >= 0) & (leader == 0)
        slot = new.long().sort(dim=-1, descending=True, stable=True).indices[..., : int(new.sum(-1).max())]
        fresh = (
            slot,
            new.gather(-1, slot),
            chance(at.gather(-1, slot), view.layer_idx, self.seed, self.samples + self.per),
        )
        kept = self.sample_values(view, at, *fresh) | self.sample_keys(view, leader, *fresh)
        stays = kept & (at >= 0)
        state["leader"] = stays.cumsum(-1).gather(-1, (state["leader"] - 1).clamp(min=0))
        view.save_state()
        view.layer.keep(stays, stays.sum(-1).cpu())

    def sample_values(self, view, at, slot, there, drawn):
        """Let new tokens take slots of the numerator; which tokens have some."""
        rows, size = view.layer.rows, view.value.double().square().sum(-1)
        fresh = size.gather(-1, slot) * there
        mass = rows.get("mass", torch.zeros_like(fresh[..., :1])) + fresh.cumsum(-1)
        takes = (drawn[..., : self.samples] < (fresh / mass)[..., None]) & there[..., None]
        last = at.gather(-1, slot)[..., None].where(takes, -1).amax(2)
        rows["mass"], rows["slots"] = mass[..., -1:], last.where(last >= 0, rows.get("slots", -1))
        times = (at[..., None] == rows["slots"][:, :, None]).sum(-1)
        view.state["above"] = (times * rows["mass"] / (self.samples * size)).masked_fill(times == 0, 0)
        return times > 0

    def sample_keys(self, view, leader, slot, there, drawn):
        """Let new tokens join clusters and take their slots; which tokens have some or are representatives."""
        state, rows, key, real = view.state, view.layer.rows, view.key.double(), view.positions >= 0
        if "unit" not in rows:
            norm = torch.linalg.vector_norm(key, dim=-1) * real
            rows["unit"] = norm.sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
        size = state.get("size", torch.zeros_like(leader)) * real
        joins = join(key, size > 0, slot, there, self.radius * rows["unit"])
        members = size.gather(-1, joins) + 1 + earlier(joins)
        size = state["size"] = size.scatter_add(-1, joins, there.long())
        leader = state["leader"] = leader.scatter(-1, slot, (joins + 1).where(there, leader.gather(-1, slot)))
        number = torch.arange(1, slot.shape[-1] + 1, device=key.device)[:, None]
        takes = ((drawn[..., self.samples :] < 1 / members[..., None]) & there[..., None]) * number
        each = (-1, -1, -1, self.per)
        last = takes.new_zeros(*leader.shape, self.per).scatter_reduce(2, joins[..., None].expand(each), takes, "amax")
        of = (leader - 1).clamp(min=0)
        latest = last.gather(2, of[..., None].expand(each))
        holds = state.get("holds", torch.zeros_like(latest, dtype=torch.bool)) & (latest == 0)
        mine = (takes > 0) & (takes == latest.gather(2, slot[..., None].expand(each)))
        now = mine.where(there[..., None], holds.gather(2, slot[..., None].expand(each)))
        holds = state["holds"] = holds.scatter(2, slot[..., None].expand(each), now)
        state["below"] = holds.sum(-1).double() * size.gather(-1, of) / self.per
        return holds.any(-1) | (size > 0)


def join(key, leads, slot, there, radius) -> torch.Tensor:
    """Which representative each new token joins, itself if it becomes one: slots `(batch, heads, new)`.

    Args:
        key: `(batch, heads, slots, dim)`. leads: `(batch, heads, slots)`, which are representatives.
        slot, there: `(batch, heads, new)`, where the new tokens stand, in text order, and which are real.
        radius: `(batch, heads, 1)`.
    """
    new = key.gather(2, slot[..., None].expand(*slot.shape, key.shape[-1]))
    least, joins = torch.full_like(new[..., 0], torch.inf), torch.zeros_like(slot)
    if bool(leads.any()):
        apart = torch.cdist(new, key, compute_mode="donot_use_mm_for_euclid_dist")
        least, joins = apart.masked_fill(~leads[:, :, None], torch.inf).min(-1)
    order = torch.arange(slot.shape[-1], device=key.device)
    while bool((alone := there & (least > radius)).any()):
        first = alone.long().argmax(-1, keepdim=True)  # all before it have one, so that it is the next
        centre = new.gather(2, first[..., None].expand(-1, -1, 1, new.shape[-1]))
        apart = torch.linalg.vector_norm(new - centre, dim=-1)
        nearer = (apart < least) & (order >= first) & alone.any(-1, keepdim=True)
        least, joins = apart.where(nearer, least), slot.gather(-1, first).where(nearer, joins)
    return joins


def earlier(x: torch.Tensor) -> torch.Tensor:
    """How many earlier elements of the last dimension are equal to each."""
    ordered, order = x.sort(dim=-1, stable=True)
    place = torch.arange(x.shape[-1], device=x.device).expand_as(x)
    begins = torch.ones_like(x, dtype=torch.bool)
    begins[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    start = place.where(begins, 0).cummax(-1).values
    return torch.empty_like(x).scatter_(-1, order, place - start)


def chance(at: torch.Tensor, layer: int, seed: int, draws: int) -> torch.Tensor:
    """Numbers in (0, 1) for tokens at `at` `(batch, heads, new)`: `(batch, heads, new, draws)`, float64."""
    heads = torch.arange(at.shape[1], device=at.device)[:, None]
    x = mixed(at + (heads << 24) + (layer << 34) + (seed << 44))
    return uniform(x[..., None] + torch.arange(1, draws + 1, device=at.device))
