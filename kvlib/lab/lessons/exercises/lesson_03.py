"""Exercises of 03_anchorcoder."""

import torch

import kvlib
from kvlib.lab.checks import expect, number, tiny_model
from kvlib.methods.anchor_training import training
from kvlib.methods.anchors import lines, visible

MARKS = {  # which tokens are marked, as a word: A is a mark, x another token
    "two lines": "xxxAxxxA",
    "a text that begins with a mark": "AxxAxxx",
    "two marks in a row": "xxAAxx",
    "no mark": "xxxx",
    "one token": "x",
    "a line that goes on": "AxxxAxxAxxxxx",
}


def check_mask(function) -> None:
    """`function(marked)`: rows of what each token sees, of all tokens; `marked` is a list of booleans."""
    for name, word in MARKS.items():
        marked = [letter == "A" for letter in word]
        before = [*marked]
        found = function(marked)
        expect(found is not None and found is not ..., f"taa_mask returned {found!r}: is there a `return`?")
        expect(marked == before, "taa_mask changes its argument, work on a copy")
        found, total = torch.as_tensor(found), len(marked)
        shape = tuple(found.shape)
        expect(shape == (total, total), f"{name} {word}: shape {shape}, expected (tokens, tokens) = {(total, total)}")
        found = found.bool()
        wrong = {hint: mask_of(marked, sees) for hint, sees in OTHER_MASKS.items()}
        expected = wrong.pop("")
        wrong["; a row is a query and a column a key, not the other way round"] = expected.T
        hint = next((hint for hint, other in wrong.items() if torch.equal(found, other)), "")
        if torch.equal(found, expected):
            continue
        i, j = (found != expected).nonzero()[0].tolist()
        says = "does not see" if expected[i, j] else "sees"
        expect(False, f"{name} {word}: token {i} ({word[i]}) {says} token {j} ({word[j]}){hint}")
    positions, marked = torch.arange(total)[None], torch.tensor([marked])
    begins, _ = lines(marked, positions, positions.new_zeros(1))
    assert torch.equal(expected, visible(positions, marked, positions, begins)[0])
    print("taa_mask is right, and the mask that kvlib trains with")


def mask_of(marked: list[bool], sees) -> torch.Tensor:
    """A mask by loops; `sees(i, j, marked, begin)`, where `begin` is that of the line of token i."""
    total = range(len(marked))
    begin = [max([0, *(j + 1 for j in range(i) if marked[j])]) for i in total]
    return torch.tensor([[bool(sees(i, j, marked, begin)) for j in total] for i in total])


OTHER_MASKS = {  # what is wrong -> who sees whom then; the first is right
    "": lambda i, j, marked, begin: j <= i and (marked[j] or j == 0 or j >= begin[i]),
    "; nobody sees what comes later": lambda i, j, marked, begin: marked[j] or j == 0 or j >= begin[i],
    "; the first token is always seen, marked or not": lambda i, j, marked, begin: (
        j <= i and (marked[j] or j >= begin[i])
    ),
    "; a mark sees earlier marks too (blind ones are those of AnLLM)": lambda i, j, marked, begin: (
        j <= i and (j >= begin[i] or (not marked[i] and (marked[j] or j == 0)))
    ),
    "; a mark closes its line, and sees the line's tokens": lambda i, j, marked, begin: (
        j <= i and (marked[j] or j == 0 or (j >= begin[i] and (j == i or not marked[i])))
    ),
    "; ordinary tokens of earlier lines are not seen: that is a full layer": lambda i, j, marked, begin: j <= i,
    "; a token sees its own line so far": lambda i, j, marked, begin: j <= i and (marked[j] or j in (0, i)),
    "; a token sees itself": lambda i, j, marked, begin: j < i and (marked[j] or j == 0 or j >= begin[i]),
    "; of earlier lines the marks are seen": lambda i, j, marked, begin: j <= i and (j == 0 or j >= begin[i]),
    "; all marks are seen, not the last one alone": lambda i, j, marked, begin: (
        j <= i and (j == 0 or j >= begin[i] or j == begin[i] - 1)
    ),
}

SETTINGS = {"anchor": 7, "ends": [9], "per": 2, "source": None, "beyond": None, "spread": False, "longest": None}
CASES = {  # what is switched on
    "TAA alone": {},
    "TAA and MHPE": {"spread": True},
    "TAA and LAA": {"source": 2, "beyond": 2},
    "all of it": {"spread": True, "source": 2, "beyond": 2},
}
OTHER_SETTINGS = {  # what is wrong -> settings that give the same
    "; nothing was freed": {"per": 1},
    "; every layer has freed, full ones too": {"per": None},
    "; full layers are those whose number is a multiple of per": {"per": 4},
    "; keys of anchors are not where the heads see them": {"spread": False},
    "; the keys of anchors were turned, though spread is False": {"spread": True},
    "; the second layer is not read": {"source": None, "beyond": None},
    "; the second layer is another one": {"source": 0, "beyond": 2},
    "; layers behind `beyond` read it, not that one": {"source": 2, "beyond": 3},
}


@torch.no_grad()
def check_decoding(function, model=None, ids: list[int] | None = None) -> None:
    """`function(model, ids, settings)`: logits `(tokens, vocabulary)`, token by token, with the stock model's cache.

    Args:
        model, ids: one that was trained with anchors, and a text of its; it is asked too, behind four tiny models.
    """
    tiny = tiny_model(layers=5)
    text = torch.randint(10, 60, (18,), generator=torch.Generator().manual_seed(0)).tolist()
    for end in (5, 6, 12):
        text[end] = SETTINGS["anchor"]
    for case, switched in CASES.items():
        settings = SETTINGS | switched
        found = function(tiny, [*text], {**settings})
        expect(found is not None and found is not ..., f"decode returned {found!r}: is there a `return`?")
        shape, expected = tuple(found.shape), masked(tiny, text, settings)
        expect(shape == expected.shape, f"{case}: shape {shape}, expected (tokens, vocabulary) = {(*expected.shape,)}")
        gap = apart(found, expected)
        if gap < 1e-6:
            continue
        wrong = [(hint, settings | other) for hint, other in OTHER_SETTINGS.items() if settings | other != settings]
        hint = next((hint for hint, other in wrong if apart(found, masked(tiny, text, other)) < 1e-6), "")
        first = int(((found - expected).abs().amax(-1) > 1e-6).nonzero()[0])
        expect(False, f"{case}: from token {first} on logits differ by {gap:.2g} from those of the training mask{hint}")
    if model is None:
        print("decode is right: on tiny models it gives the logits of the training mask")
        return
    settings = model.config.anchorcoder
    gap = apart(function(model, [*ids], {**settings}), masked(model, ids, settings))
    what = f"over {len(ids)} tokens of the trained model the largest difference of a logit is {gap:.1g}"
    expect(gap < 1e-5, f"on tiny models decode is right, but {what}")
    print(f"decode is right: {what}")


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max())


def masked(model, ids: list[int], settings: dict) -> torch.Tensor:
    """Logits `(tokens, vocabulary)` with the mask of training, of a text read at once."""
    method = kvlib.method("anchorcoder", **settings | {"ends": tuple(settings["ends"])})
    with training(model, method), torch.no_grad():
        return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]


def check_share_stored(function) -> None:
    """`function(lines, layers, per)`: bytes stored of a text, over those of a full cache of the text without anchors.

    lines: tokens of each line, newlines counted and anchors not; the text begins with BOS and ends with a newline.
    """
    cases = [([6, 9, 5], 30, 4), ([12] * 100, 30, 6), ([1] * 8, 16, 4), ([30], 16, 16), ([5, 20, 11], 16, None)]
    for text, layers, per in cases:
        given = [*text]
        found = number(function(given, layers, per), "share_stored")
        expect(given == text, "share_stored changes its argument, work on a copy")
        case = f"{len(text)} lines, {sum(text)} tokens, {layers} layers, per={per}"
        plain, marks = sum(text) + 1, len(text) + 1
        full, stream = -(-layers // per) if per else 0, plain + len(text)

        def share(full=full, tokens=stream, kept=marks, of=plain, layers=layers):
            return (full * tokens + (layers - full) * kept) / (layers * of)

        expected = share()
        hints = {
            "; that is the share of the anchored stream, asked for was the original text": share(of=stream),
            "; full layers store anchors, too": share(tokens=plain),
            "; BOS is a mark, and stays": share(kept=len(text)),
            "; layer 0 is full for every per: round up": share(full=layers // per if per else 0),
            "; with per=None no layer is full": share(full=1) if per is None else share(full=0),
            "; of finished lines anchors alone are left": share(kept=marks + text[-1]),
            "; that is what is freed": 1 - expected,
            "; a share of 1 is asked for, not percent": 100 * expected,
            "; TAA layers keep the anchors": share(kept=0),
            "; every layer counts, not one of each kind": share(full=1, layers=2),
        }
        near = [hint for hint, wrong in hints.items() if abs(wrong - expected) > 1e-9 and abs(found - wrong) < 1e-9]
        message = f"{case}: {expected:.4f} is expected, found {found:.4f}{''.join(near[:1])}"
        expect(abs(found - expected) < 1e-9, message)
    print("share_stored is right")
