"""Exercises of 04b_tidaldecode_budgets."""

import itertools
import math

import torch

from kvlib.lab.checks import expect, number

SHAPES = {  # name -> layers, query heads, KV heads, tokens seen
    "SmolLM2": (30, 9, 3, 2048),
    "Llama-3.1-8B": (32, 32, 8, 131072),
    "a model without grouped heads": (16, 6, 6, 1000),
}


def check_largest_k(function) -> None:
    """`function(layers, dense, query_heads, kv_heads, tokens, share)`: the largest k whose step reads no more."""
    for (name, shape), dense, share in itertools.product(SHAPES.items(), (2, 4), (1.0, 0.5, 0.25, 0.0625)):
        layers, query_heads, kv_heads, tokens = shape
        found = number(function(*shape[:1], dense, *shape[1:], share), "largest_k")
        group, sparse = query_heads // kv_heads, layers - dense
        exact = (share * layers - dense) * tokens / (sparse * group)
        expected = max(0, math.floor(exact))
        hints = {
            math.ceil(exact): "; so many read a little more than allowed: round down",
            exact: "; a whole number of tokens is asked for",
            math.floor(exact): "; a set has no fewer tokens than none",
            math.floor(exact * group): "; every query head of a group loads the rows of its own set",
            math.floor(share * tokens / group): "; the dense layers and the selection layers read everything",
            math.floor(exact / kv_heads): "; each KV head has rows of its own, stored and read alike",
        }
        hint = next((hint for wrong, hint in hints.items() if found == wrong), "")
        case = f"{name}, {dense} dense layers, {share:g} of the bytes"
        expect(found == expected, f"{case}: {expected} is expected, found {found:g}{hint}")
    print("largest_k is right")


def check_page_rows(function) -> None:
    """`function(chosen, kv_heads, page)`: rows per KV head if pages are read, once for all its query heads."""
    generator = torch.Generator().manual_seed(0)
    for kv_heads, group, tokens, page in ((3, 3, 41, 4), (2, 4, 50, 16), (2, 3, 37, 1), (4, 1, 30, 7), (2, 2, 20, 64)):
        chosen = torch.rand(kv_heads * group, tokens, generator=generator) < 0.08
        chosen[:, -1] = True  # the newest token, in a page that may be cut
        before, case = chosen.clone(), f"{kv_heads} KV heads, groups of {group}, {tokens} tokens, pages of {page}"
        found = function(chosen, kv_heads, page)
        expect(found is not None and found is not ..., f"page_rows returned {found!r}: is there a `return`?")
        expect(torch.equal(chosen, before), "page_rows changes its argument, work on a copy")
        rows = [int(row) for row in found]
        message = f"{case}: {len(rows)} numbers, one per KV head is expected"
        expect(len(rows) == kv_heads, message + ("; that is one per query head" if len(rows) == len(chosen) else ""))
        sets = [{*mask.nonzero().flatten().tolist()} for mask in chosen]
        groups = [sets[head * group : (head + 1) * group] for head in range(kv_heads)]
        apart = [sets[head::kv_heads] for head in range(kv_heads)]
        expected = [in_pages(set().union(*own), page, tokens) for own in groups]
        hints = {
            "; the last page is cut, it has only the tokens that there are": [
                page * len({token // page for token in set().union(*own)}) for own in groups
            ],
            "; that is the number of pages, asked for are rows": [
                len({token // page for token in set().union(*own)}) for own in groups
            ],
            "; that is the union of the tokens, but whole pages are read": [len(set().union(*own)) for own in groups],
            "; that is every query head for itself, a page is read once for its group": [
                sum(in_pages(each, page, tokens) for each in own) for own in groups
            ],
            "; the query heads of a KV head are neighbours: 0 to group - 1 are those of the first": [
                in_pages(set().union(*own), page, tokens) for own in apart
            ],
            "; that is the union over all heads, each KV head has rows of its own": [
                in_pages(set().union(*sets), page, tokens)
            ]
            * kv_heads,
            "; that is what all query heads of the group have in common": [
                in_pages(set.intersection(*own), page, tokens) for own in groups
            ],
        }
        hint = next((hint for hint, wrong in hints.items() if rows == wrong), "")
        expect(rows == expected, f"{case}: {expected} is expected, found {rows}{hint}")
    print("page_rows is right")


def in_pages(chosen: set, page: int, tokens: int) -> int:
    """Tokens in the pages that hold any of these; the last page ends with the last token."""
    return sum(min(page, tokens - page * number) for number in {token // page for token in chosen})
