"""Exercises of 00b_eviction."""

from itertools import product

import torch

import kvlib
from kvlib.lab.checks import expect, tiny_model
from kvlib.lab.statistics import paired_difference


def check_in_window(function) -> None:
    """`function(position, tokens, budget)`: does StreamingLLM keep that token? It is asked."""
    model = tiny_model(layers=1)
    for tokens, budget in ((90, 0.2), (97, 0.25), (41, 0.5), (30, 0.33)):
        with kvlib.method("streaming_llm", budget=budget)(model) as run, torch.no_grad():
            model(torch.arange(tokens)[None] % 60)
        kept = set(run.kept(0)[0, 0].tolist())
        found = [function(position, tokens, budget) for position in range(tokens)]
        expect(not {None, ...} & set(found), f"in_window returned {found[0]!r}: is there a `return`?")
        mine = {position for position, answer in enumerate(found) if answer}
        where = f"{tokens} tokens, budget {budget}: "
        expect(
            {0, 1, 2, 3} <= mine, f"{where}the first four tokens always stay, you evict {sorted({0, 1, 2, 3} - mine)}"
        )
        expect(tokens - 1 in mine, f"{where}the last token stays")
        expect(
            len(mine) == len(kept),
            f"{where}you keep {len(mine)} tokens, the budget is {len(kept)}: it is rounded down, and the first four "
            "count in it",
        )
        expect(mine == kept, f"{where}you keep {sorted(mine - kept)} instead of {sorted(kept - mine)}")
    print("in_window is right")


@torch.no_grad()
def check_by_hand(keep, evict) -> None:
    """SnapKV in two functions.

    Args:
        keep: `(attention, count, kernel)`: `(kv_heads, group, window, tokens)` to positions `(kv_heads, count)`.
        evict: `(keys, values, kept)`: `(1, kv_heads, tokens, head_dim)` twice to the same of the kept tokens only.
    """
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 3, 4, 30, generator=generator, dtype=torch.float64) ** 8
    for count, kernel in ((12, 1), (12, 5), (7, 3), (30, 7)):
        what, scores = f"{count} of 30 tokens, kernel {kernel}: ", score_by_loops(attention, kernel)
        found = keep(attention, count, kernel)
        expect(found is not None and found is not ..., f"keep returned {found!r}: is there a `return`?")
        expect(tuple(found.shape) == (2, count), f"{what}keep gives shape {tuple(found.shape)}, expected (2, {count})")
        for head, (mine, score) in enumerate(zip(found.tolist(), scores)):
            where = f"{what}KV head {head}: "
            expect(len(set(mine)) == count, f"{where}a token is kept twice")
            expect({26, 27, 28, 29} <= set(mine), f"{where}the window, the last 4 tokens, stays")
            least = sorted(score, reverse=True)[count - 1]  # many tokens share a score: any of these may stay
            missing = sorted({i for i in range(30) if score[i] > least} - set(mine))
            more = [i for i in mine if score[i] < least]
            expect(not more, f"{where}{missing} should stay and not {sorted(more)}{hints(attention, mine)}")

    keys, values = (torch.randn(1, 2, 9, 4, generator=generator) for _ in range(2))
    kept = torch.tensor([[0, 3, 8], [1, 2, 5]])
    found = evict(keys, values, kept)
    pair = isinstance(found, tuple | list) and len(found) == 2 and all(map(torch.is_tensor, found))
    expect(pair, f"evict returned {type(found).__name__}, not the pair keys, values")
    for name, one, whole in zip(("keys", "values"), found, (keys, values)):
        shape = tuple(one.shape)
        expect(shape == (1, 2, 3, 4), f"evict: {name} have shape {shape}, expected (1, 2, 3, 4)")
        for head in range(2):
            same = torch.equal(one[0, head], whole[0, head, kept[head]])
            expect(same, f"evict: {name} of KV head {head} are not those of its tokens {kept[head].tolist()}")
    print("keep and evict are right: SnapKV by hand")


def score_by_loops(attention, kernel: int) -> list[list[float]]:
    """Token by token, head by head; infinite in the window."""
    heads, _, window, tokens = attention.shape
    scores, reach, outside = [], kernel // 2, tokens - window
    for head in range(heads):
        mean = attention[head].mean((0, 1)).tolist()
        pooled = [max(mean[max(0, i - reach) : min(outside, i + reach + 1)]) for i in range(outside)]
        scores.append([*pooled, *[float("inf")] * window])
    return scores


def hints(attention, mine: list[int]) -> str:
    """What a wrong choice looks like."""
    window, tokens, count = *attention.shape[-2:], len(mine)
    everyone = attention.mean((0, 1, 2))[: tokens - window].topk(count - window).indices.tolist()
    if set(everyone) | set(range(tokens - window, tokens)) == set(mine):
        return "; each KV head chooses for itself"
    return "; score = mean over window and group, then the highest among `kernel` neighbours, none from the window"


def check_smallest_budget(function, table) -> None:
    """The smallest budget that surely loses at most `loss`, or None: `function(table, task, configuration, loss)`."""
    configurations = table.loc[table["method"].isin(("random", "snapkv", "knorm")), "configuration"].unique()
    for task, configuration, loss in product(table["task"].unique(), configurations, (0.1, 0.3, 0.9)):
        expected = smallest_budget(table, task, configuration, loss)
        found = function(table, task, configuration, loss)
        expect(found is not ..., "smallest_budget returned Ellipsis: replace the `...`")
        hint = ""
        if found is not None and (expected is None or found < expected):
            hint = "; too optimistic: not the mean but the lower end of its interval has to be above -loss"
        expect(found == expected, f"{task}, {configuration}, loss {loss}: expected {expected}, found {found}{hint}")
    print("smallest_budget is right")


def smallest_budget(table, task: str, configuration: str, loss: float) -> float | None:
    """Smallest budget whose paired difference to the full cache has a 95 % interval entirely above -loss."""
    rows = table[table["task"] == task].set_index("sample").sort_index()
    full = rows.loc[rows["method"] == "full", "value"]
    for budget, cell in rows[rows["configuration"] == configuration].groupby("budget"):
        if paired_difference([cell["value"]], [full[cell.index]]).low > -loss:
            return budget
    return None
