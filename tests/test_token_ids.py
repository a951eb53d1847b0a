"""A cache knows which tokens it has read: a text that no longer matches is refused, and names the first difference."""

import pytest
import tiny
import torch
from test_capture import read as read_two_rows

import kvlib

KNORM, H2O = kvlib.method("knorm", budget=0.5), kvlib.method("h2o", budget=0.5)
GREEDY = {"max_new_tokens": 3, "do_sample": False}
ROWS = [tiny.tokens(20), tiny.tokens(13, seed=1)]


def known(run) -> list[list[int]]:
    """The ids of each row's tokens."""
    cache = run.cache
    return [row[:count].tolist() for row, count in zip(cache.ids, cache.tokens.tolist(), strict=True)]


def real(ids, mask) -> list[list[int]]:
    return [row[there.bool()].tolist() for row, there in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("chunk", [None, 6, 20])
@pytest.mark.parametrize("method", [KNORM, H2O], ids=lambda m: m.name)
def test_ids_of_all_that_was_read_are_known(method, chunk):
    """Evicted ones too, in padded rows, chunks, answers and later turns, at 4 bytes each."""
    model = tiny.model("llama-gqa")
    with method(model) as run:
        turn = tiny.generate(model, run, ROWS, new=3, extra=2, chunk=chunk)
        assert known(run) == real(turn.ids[:, :-1], turn.mask[:, :-1])
        turn = tiny.generate(model, run, [tiny.tokens(70, seed=2)] * 2, new=70, chunk=chunk, before=turn)
        assert known(run) == real(turn.ids[:, :-1], turn.mask[:, :-1])
        assert run.cache.ids.dtype == torch.int32 and run.cache.ids.shape[1] <= 20 + 3 + 70 + 70 + 64
        run.cache.select_rows(torch.tensor([1, 1, 0]))
        assert known(run) == [real(turn.ids[:, :-1], turn.mask[:, :-1])[row] for row in (1, 1, 0)]
        run.read(input_ids=turn.ids[:, :40], attention_mask=turn.mask[:, :40])
        made = run.ask(turn.ids[:, 40:45], **GREEDY)
        whole = torch.cat([turn.ids[:, :40], made[:, :-1]], dim=1)
        assert known(run) == real(whole, torch.cat([turn.mask[:, :40], torch.ones_like(made[:, :-1])], dim=1))
    ids, mask = tiny.pad(ROWS)
    with method(model) as run:
        run.fork(kvlib.snapshot(model, ids, mask))
        assert known(run) == real(ids, mask)


@pytest.mark.parametrize("name", ["full", "h2o"])
def test_captured_steps_note_their_ids(name):
    model, fed = tiny.model("llama-gqa"), []
    with kvlib.method(name, budget=1.0 if name == "full" else 0.4)(model) as run, torch.no_grad():
        token = read_two_rows(model, "cpu")
        with run.capture(70) as step:
            memory = set()
            for i in range(70):
                fed.append(token.flatten().tolist())
                token = step(token).argmax(-1, keepdim=True)
                memory.add(run.cache.ids.data_ptr() if i > 2 else None)  # a graph goes on writing to the same place
    assert [row[40:] for row in known(run)] == [list(row) for row in zip(*fed, strict=True)]
    assert len(memory - {None}) == 1


def test_room_for_ids_is_made_rarely():
    """Not at every step, which would copy all ids each time."""
    model, sizes = tiny.model("llama-gqa"), set()
    with H2O(model) as run, torch.no_grad():
        token = read_two_rows(model, "cpu")
        for _ in range(70):
            model(token, past_key_values=run.cache)
            sizes.add(run.cache.ids.shape[1])
    assert len(sizes) == 2 and max(sizes) <= 110 + 64


@pytest.mark.parametrize("only_new", [False, True])
@pytest.mark.parametrize("place", [0, 12, 21])
def test_a_text_that_was_rewritten_is_refused(place, only_new):
    """As chat templates do with what was said before. Positions are those of the row's real tokens."""
    model = tiny.model("llama-gqa")
    with KNORM(model) as run:
        turn = tiny.generate(model, run, ROWS, new=3, extra=2)
        more = torch.cat([turn.ids, tiny.tokens(2, 4, seed=2)], dim=1)
        mask = torch.cat([turn.mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
        old = int(more[0, 2 + place])
        rewritten = more.clone()
        rewritten[0, 2 + place], rewritten[1, 22] = (old + 1) % 64, (int(more[1, 22]) + 1) % 64
        message = f"token {place} of row 0 was {old} when it was read and is {(old + 1) % 64} now; start without past"
        given = rewritten[:, 2 if only_new else 0 :]
        before = tiny.kept(run)
        with pytest.raises(ValueError, match=message):
            model.generate(given, attention_mask=mask, past_key_values=run.cache, **GREEDY)
        assert tiny.kept(run) == before
        rewritten[0, :2], rewritten[1, 22] = 5, more[1, 22]  # padding may be anything
        rewritten[0, 2 + place] = old
        model.generate(rewritten, attention_mask=mask, past_key_values=run.cache, **GREEDY)


def test_texts_without_a_mask_are_compared_too():
    model, ids = tiny.model("llama-gqa"), tiny.tokens(1, 12)
    with KNORM(model) as run:
        made = model.generate(ids, **GREEDY)
        for given in ({"input_ids": made.roll(1)}, {"inputs": made.roll(1)}):
            with pytest.raises(ValueError, match="the text is not the one that the cache holds: token 0 of row 0 was"):
                model.generate(**given, past_key_values=run.cache, **GREEDY)
        model.generate(made, past_key_values=run.cache, **GREEDY)


def test_padded_texts_whose_mask_transformers_derives():
    model, (ids, mask) = tiny.model("llama-gqa"), tiny.pad(ROWS)
    options = {**GREEDY, "pad_token_id": 0, "suppress_tokens": [0]}
    with KNORM(model) as run:
        made = model.generate(ids, attention_mask=mask, **options)
        rewritten = made.clone()
        rewritten[1, 10] = made[1, 10] % 63 + 1
        with pytest.raises(ValueError, match="token 3 of row 1 was"):
            model.generate(rewritten, past_key_values=run.cache, **options)
        model.generate(made, past_key_values=run.cache, **options)


def test_embeddings_have_no_ids_to_compare():
    model, ids = tiny.model("llama-gqa"), tiny.tokens(1, 12)
    with KNORM(model) as run:
        model(inputs_embeds=model.get_input_embeddings()(ids[:, :8]))
        model(ids[:, 8:], past_key_values=run.cache)
        assert known(run) == [[-1] * 8 + ids[0, 8:].tolist()]
        more = torch.cat([ids.flip(1)[:, :8], ids[:, 8:], ids], dim=1)
        rewritten = more.clone()
        rewritten[0, 9] = more[0, 9] % 63 + 1
        with pytest.raises(ValueError, match="token 9 of row 0"):
            model.generate(rewritten, past_key_values=run.cache, **GREEDY)
        model.generate(more, past_key_values=run.cache, **GREEDY)


def test_beams_are_compared_with_their_own_text():
    model, ids = tiny.model("llama-gqa"), tiny.tokens(1, 12)
    with KNORM(model) as run:
        model(ids)
        run.cache.batch_repeat_interleave(3)
        more = torch.cat([ids, tiny.tokens(1, 4, seed=1)], dim=1)
        with pytest.raises(ValueError, match="token 11 of row 0"):
            model.generate(torch.where(torch.arange(16) == 11, 1 + more % 63, more), num_beams=3,
                           past_key_values=run.cache, **GREEDY)  # fmt: skip
        model.generate(more, num_beams=3, past_key_values=run.cache, **GREEDY)
        with pytest.raises(ValueError, match="token 1[2-9] of row [0-2]"):  # the beams have parted
            model.generate(torch.cat([more, more], dim=1), num_beams=3, past_key_values=run.cache, **GREEDY)


def test_ids_go_where_their_rows_have_come_to():
    """Rows of one length, of which one then forgets more than the other."""
    model, fed = tiny.model("llama-gqa"), tiny.tokens(2, 12, seed=3)
    with kvlib.method("full")(model) as run, torch.no_grad():
        model(tiny.tokens(2, 20))
        read = known(run)
        for token in fed[:, :6].split(1, dim=1):
            model(token, past_key_values=run.cache)
        assert run.cache.even
        run.cache.forget(torch.tensor([1, 4]))
        for token in fed[:, 6:].split(1, dim=1):
            model(token, past_key_values=run.cache)
        assert not run.cache.even
        for row, left in ((0, 5), (1, 2)):
            assert known(run)[row] == read[row] + fed[row, :left].tolist() + fed[row, 6:].tolist()
