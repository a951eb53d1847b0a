"""What the contract carries, by throw-away methods: ragged heads, shortened hidden states, a second layer's cache.

They use the hooks of `kvlib.Method` only, are not registered, and have the properties of every method.
"""

from dataclasses import dataclass

import properties
import pytest
import tiny
import torch
from properties import Conversation
from transformers import LogitsProcessor, LogitsProcessorList

import kvlib
from kvlib.core import attention


def on(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda m: f"{type(m).__name__}-{m.budget}")


# (a) Every head and layer keeps a number of its own, and remembers something about every token


@dataclass(frozen=True)
class Ragged(kvlib.Evictor):
    """Head h of layer l keeps half of (h + 1) / (l + 1) of the budget; every token carries its key and its age."""

    evicts_in_decode = True

    def budgets(self, view):
        share = torch.arange(1, view.lengths.shape[1] + 1) / (view.layer_idx + 1)
        return (self.tokens(view, self.budget)[:, None] // 2 * share).long()

    def observe(self, view):
        trace = view.state.get("trace", torch.zeros(*view.key.shape[:3], 2, 5, dtype=view.key.dtype))
        old = trace[..., 0, 0] > 0  # what `observe` has seen before; new tokens start at 0
        first = torch.cat([torch.ones_like(trace[..., 0, :1]), view.key[..., :4]], dim=-1)
        trace = trace.clone()
        trace[..., 0, :] = torch.where(old[..., None], trace[..., 0, :], first)
        trace[..., 1, :] = trace[..., 1, :] + 1
        view.state["trace"] = trace

    def score(self, view):
        return torch.linalg.vector_norm(view.key, dim=-1)


@dataclass(frozen=True)
class RaggedPrompt(Ragged):
    """The same, once at the end of the prompt."""

    evicts_in_decode = False


# (b) A third of the prompt does not go on into layer 1


@dataclass(frozen=True)
class Shorten(kvlib.Evictor):
    """The real tokens 1, 4, 7, ... of a pass over more than one column leave the residual stream before layer 1."""

    own_prefill = True

    def before_layer(self, run, layer_idx):
        real = run.step.positions >= 0
        if layer_idx != 1 or real.shape[1] == 1:
            return None
        stays = real & ((real.cumsum(1) - 1) % 3 != 1)
        stays[:, -1] = True
        columns = int(stays.sum(1).max())
        # Rows of the batch go on with equally many columns: where fewer tokens stay, padding fills the row.
        order = ((~real).long() + 2 * stays.long()).sort(dim=1, stable=True).indices
        return order[:, -columns:].sort(dim=1).values

    def score(self, view):
        return torch.linalg.vector_norm(view.key, dim=-1)


# (c) Layer 1 has no attention of its own: it reads what layer 0 stores


@dataclass(frozen=True)
class Reader(kvlib.Evictor):
    """Queries of layer 1 look at keys and values of layer 0, after layer 0 has evicted."""

    own_prefill = True

    def attend(self, view):
        return attention.attend(view.other(0) if view.layer_idx == 1 else view)

    def score(self, view):
        return torch.linalg.vector_norm(view.key, dim=-1)


# (d) Layer 1 keeps what layer 0 has chosen


@dataclass(frozen=True)
class Handed(kvlib.Evictor):
    """The first layer's key norms decide for all layers; they travel within the pass."""

    def score(self, view):
        norms = torch.linalg.vector_norm(view.key, dim=-1)
        return view.step.shared.setdefault("norms", norms) if view.step.ends_prompt else norms


GATE = [Ragged(0.5), Ragged(5), RaggedPrompt(0.5), Shorten(1.0), Shorten(0.5), Reader(1.0), Reader(0.5), Handed(0.5)]
everywhere = pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))


# What every method has to do


@everywhere
@on(GATE)
@pytest.mark.parametrize("first", [(19, 12), (8, 23, 16)], ids=str)
def test_padding_and_company_change_nothing(architecture, method, first):
    talk = Conversation(first, second=9, extra=3, only_new=len(first) == 3)
    properties.same_alone_and_in_company(tiny.model(architecture), method, talk)


@everywhere
@on([Ragged(0.5), Ragged(5), RaggedPrompt(0.5), Reader(1.0), Handed(0.5)])
@pytest.mark.parametrize("chunk", [4, 19])
def test_chunks_change_nothing(architecture, method, chunk):
    # The others depend on chunks by their nature: `Shorten` drops tokens of one pass at a time, and an evicting
    # `Reader` reads less from the moment on at which layer 0 evicts.
    talk = Conversation(first=(20, 13), second=8, extra=6, chunk=chunk)
    properties.same_alone_and_in_company(tiny.model(architecture), method, talk)


@everywhere
@on([Ragged(0.5), Ragged(5), RaggedPrompt(0.5), Handed(0.5)])
def test_fork_continues_like_the_live_run(architecture, method):
    properties.fork_continues_like_live(
        tiny.model(architecture), method, Conversation(first=(20, 13), second=1, extra=2)
    )


@on([method for method in GATE if method.own_prefill])
def test_methods_with_their_own_prefill_cannot_fork(method):
    model = tiny.model()
    snapshot = kvlib.snapshot(model, tiny.tokens(1, 9))
    with (
        method(model) as run,
        pytest.raises(ValueError, match=r"\w+\(.*\) changes the prefill and cannot start from a snapshot"),
    ):
        run.fork(snapshot)


@on(GATE)
def test_beams_have_their_own_history(method):
    properties.beams_have_their_own_history(
        tiny.model(), method, [tiny.tokens(19), tiny.tokens(12, seed=1)], beams=3, new=5
    )


# (a)


@everywhere
@on([Ragged(0.5), Ragged(5), RaggedPrompt(0.5)])
def test_evicting_is_hiding(architecture, method):
    model = tiny.model(architecture)
    passes = [tiny.tokens(1, length, seed=length) for length in (30, 1, 1, 9, 1, 1)]
    logits, visible = properties.teacher_forced(model, method, passes)
    hidden = properties.masked_logits(model, torch.cat(passes, dim=1), visible)
    torch.testing.assert_close(logits, hidden, rtol=0, atol=1e-10)


def test_ragged_budgets_free_what_they_evict():
    model = tiny.model("llama-mha")
    with Ragged(0.5)(model) as run:
        logits = model(*tiny.pad([tiny.tokens(40), tiny.tokens(20, seed=1)])).logits[:, -1]
        properties.well_formed(run)
        assert run.cache.layers[0].lengths.tolist() == [[10, 20, 30, 40], [5, 10, 15, 20]]
        assert run.cache.layers[1].lengths.tolist() == [[5, 10, 15, 20], [2, 5, 7, 10]]
        stored = run.stored_bytes()
        tiny.decode(model, run, logits, new=4)
        properties.well_formed(run)
        assert run.stored_bytes() == stored


@everywhere
def test_state_stays_with_its_token(architecture):
    # Through eviction at the prompt and while decoding, a second turn, padding, and the reordering of beams.
    model = tiny.model(architecture)
    with RaggedPrompt(0.5)(model) as run:
        turn = tiny.generate(model, run, [tiny.tokens(21), tiny.tokens(14, seed=1)], extra=2, chunk=8)
        _check_traces(run)
        tiny.generate(model, run, [tiny.tokens(6), tiny.tokens(6, seed=1)], before=turn)
        _check_traces(run)
        ids, mask = tiny.pad([tiny.tokens(21), tiny.tokens(14, seed=1)])
        model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=5)
        _check_traces(run)


def _check_traces(run):
    for layer in run.cache.layers:
        trace, keys = tiny.remembered(layer, "trace"), layer.tail.rectangle(layer.tail.fields["key"])
        for row, lengths in enumerate(layer.lengths.tolist()):
            for head, length in enumerate(lengths):
                remembered = trace[row, head, :length]
                assert remembered.shape == (length, 2, 5)
                assert torch.equal(remembered[:, 0, 1:], keys[row, head, :length, :4])
                assert (remembered[:, 0, 0] == 1).all()
                # A token is as old as the number of passes since it came; later tokens are never older.
                age = remembered[:, 1, 0]
                assert (age[:-1] >= age[1:]).all() and (age >= 1).all()


# (b)


@torch.no_grad()
def _shortened_by_hand(model, ids, dropped):
    """Logits of the columns that reach the end: stock decoder layers, `dropped` columns taken out between them."""
    decoder = model.model
    hidden, positions = decoder.embed_tokens(ids), torch.arange(ids.shape[1])[None]
    stays = torch.tensor([i for i in range(ids.shape[1]) if i not in dropped])
    cos, sin = decoder.rotary_emb(hidden, positions)
    hidden = decoder.layers[0](hidden, attention_mask=None, position_ids=positions, position_embeddings=(cos, sin))
    short = (cos[:, stays], sin[:, stays])
    hidden = decoder.layers[1](
        hidden[:, stays], attention_mask=None, position_ids=positions[:, stays], position_embeddings=short
    )
    return model.lm_head(decoder.norm(hidden))


@everywhere
def test_shortened_hidden_states_are_the_stock_layers_on_fewer_columns(architecture):
    model, method = tiny.model(architecture), Shorten(1.0)
    passes = [tiny.tokens(1, length, seed=length) for length in (22, 1, 1, 8, 1, 1)]
    ids = torch.cat(passes, dim=1)
    dropped = {*range(1, 21, 3), *range(24 + 1, 31, 3)}  # single tokens and the last one of a pass stay
    logits = []
    with method(model) as run:
        for turn in passes:
            logits.append(model(turn, past_key_values=run.cache).logits)
        assert run.kept(0).tolist() == [[[*range(34)]] * model.config.num_key_value_heads]
        assert run.kept(1).tolist() == [[[i for i in range(34) if i not in dropped]] * model.config.num_key_value_heads]
        assert run.full_bytes() == 34 * properties.token_bytes(model)
    torch.testing.assert_close(torch.cat(logits, dim=1), _shortened_by_hand(model, ids, dropped), rtol=0, atol=1e-10)


@dataclass(frozen=True)
class ShortenTwice(kvlib.Evictor):
    """The first token leaves before layer 0 and the next one before layer 1."""

    own_prefill = True

    def before_layer(self, run, layer_idx):
        columns = run.step.positions.shape[1]
        return torch.arange(1, columns)[None].expand(len(run.step.positions), -1) if columns > 2 else None


def test_shortening_twice_counts_columns_from_the_input():
    model = tiny.model()
    with ShortenTwice()(model) as run:
        logits = model(tiny.tokens(2, 12)).logits
        assert run.step is None
    assert logits.shape[1] == 10
    assert run.kept(0).tolist() == [[[*range(1, 12)]] * 2] * 2
    assert run.kept(1).tolist() == [[[*range(2, 12)]] * 2] * 2
    visible = [torch.ones(2, 12, 12).tril().bool() for _ in range(2)]
    visible[0][..., :1], visible[1][..., :2] = False, False
    hidden = properties.masked_logits(model, tiny.tokens(2, 12)[:1], visible)
    torch.testing.assert_close(logits[:1], hidden[:, 2:], rtol=0, atol=1e-10)


# (c)


@torch.no_grad()
def _read_by_hand(model, ids, visible):
    """Logits where layer 1 attends to keys and values of layer 0, as far as `visible[1]` lets it see."""
    stash = {}

    def forward(module, query, key, value, attention_mask, visible=None, **kwargs):
        stash.setdefault("first", (key, value))
        return properties.masked_attention(module, query, *stash["first"], attention_mask, visible=visible, **kwargs)

    with properties.attending_with(model, forward):
        return model(ids, use_cache=False, visible=visible).logits


@everywhere
@on([Reader(1.0), Reader(0.5)])
def test_reading_the_other_layer_is_attention_over_its_cache(architecture, method):
    model = tiny.model(architecture)
    passes = [tiny.tokens(1, length, seed=length) for length in (22, 1, 1, 8, 1, 1)]
    logits, visible = properties.teacher_forced(model, method, passes)
    # Layer 1 sees what layer 0 holds after its eviction: what it shows to the first query of the next pass.
    visible[1] = visible[0].clone()
    start = 0
    for ids in passes[:-1]:
        end = start + ids.shape[1]
        visible[1][:, start:end] &= visible[0][:, end, None] | (torch.arange(34) >= end)
        start = end
    by_hand = _read_by_hand(model, torch.cat(passes, dim=1), visible)
    torch.testing.assert_close(logits, by_hand, rtol=0, atol=1e-10)


# The smaller hooks


def test_hooks_around_generate_and_token_ids():
    seen, arguments = [], []

    class Seven(LogitsProcessor):
        def __call__(self, ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    @dataclass(frozen=True)
    class Watching(kvlib.Evictor):
        def on_generate(self, run, given):
            arguments.append(given)
            return {**given, "logits_processor": LogitsProcessorList([Seven()])}

        def on_token_ids(self, run, token_ids):
            seen.append(token_ids)
            assert run.step.seen == (sum(ids.shape[1] for ids in seen) if token_ids is not None else 9)

    model, ids = tiny.model(), tiny.tokens(2, 9)
    with Watching()(model) as run:
        out = model.generate(ids, max_new_tokens=4, do_sample=False)
        seen_ids, arguments_given = torch.cat(seen, dim=1), arguments[:]
        seen.clear()
        model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(seen_ids, out[:, :-1])
    assert (out[:, 9:] == 7).all()
    assert arguments_given == [{"max_new_tokens": 4, "do_sample": False}]
    assert seen == [None]
    assert run.cache.get_seq_length() == 9


def test_layers_of_one_pass_share_a_space_that_the_next_pass_does_not_see():
    read = []

    @dataclass(frozen=True)
    class Sharing(kvlib.Evictor):
        def attend(self, view):
            read.append((view.layer_idx, view.step.index, dict(view.step.shared)))
            view.step.shared[view.layer_idx] = view.step.index
            return super().attend(view)

    model = tiny.model()
    with Sharing()(model):
        model.generate(tiny.tokens(1, 9), max_new_tokens=3, do_sample=False)
    assert read == [(layer, step, {0: step} if layer else {}) for step in range(3) for layer in range(2)]


def test_a_method_that_reads_less_says_so():
    @dataclass(frozen=True)
    class Sparse(kvlib.Evictor):
        def attend(self, view):
            if view.step.decoding and view.layer_idx == 1:
                view.note_read(torch.tensor([100]))
            return super().attend(view)

    model = tiny.model()
    with Sparse()(model) as run:
        model(tiny.tokens(1, 9))
        assert run.read_bytes() == run.stored_bytes()
        model(tiny.tokens(1, 1), past_key_values=run.cache)
        assert run.read_bytes() == run.stored_bytes() // 2 + 100


def test_window_of_queries_is_refused_if_it_was_not_declared():
    @dataclass(frozen=True)
    class Greedy(kvlib.Evictor):
        window = 2

        def score(self, view):
            return view.column_sums(last=3).sum(2)

    model = tiny.model()
    with Greedy(0.5)(model), pytest.raises(ValueError, match=r"last=3: the method declares window=2 queries"):
        model(tiny.tokens(1, 9))


def test_column_sums_of_a_layer_that_has_evicted_are_refused():
    @dataclass(frozen=True)
    class Late(Reader):
        def attend(self, view):
            if view.layer_idx == 1:
                view.other(0).column_sums()
            return super().attend(view)

    model = tiny.model()
    with Late(0.5)(model), pytest.raises(ValueError, match="layer 0 has already evicted"):
        model(tiny.tokens(1, 9))


def test_score_is_the_one_thing_that_must_be_defined():
    @dataclass(frozen=True)
    class Nothing(kvlib.Evictor):
        pass

    model = tiny.model()
    with Nothing(0.5)(model), pytest.raises(NotImplementedError, match=r"Nothing must define score\(view\)"):
        model(tiny.tokens(1, 9))


# What a view says


NEVER = 10**6  # a budget in tokens that no prompt reaches: `observe` runs, nothing is evicted


@dataclass(frozen=True)
class Table(kvlib.Evictor):
    """Scores from a table with many ties, different in every layer and head."""

    def score(self, view):
        head = torch.arange(view.lengths.shape[1])[:, None]
        return (view.positions * 7 + head * 5 + view.layer_idx * 3).remainder(11).float()


@pytest.mark.parametrize("chunk", [None, 8])
def test_the_highest_scores_stay_and_ties_go_to_the_earlier_token(chunk):
    model = tiny.model("llama-mha")
    with Table(0.4)(model) as run:
        tiny.generate(model, run, [tiny.tokens(33), tiny.tokens(20, seed=1)], new=1, extra=2, chunk=chunk)
        kept = tiny.kept(run)
    for row, length in enumerate((33, 20)):
        for layer in range(2):
            for head in range(4):
                best = sorted(range(length), key=lambda i: (-((i * 7 + head * 5 + layer * 3) % 11), i))
                assert kept[row][layer][head] == sorted(best[: int(0.4 * length)])


@dataclass(frozen=True)
class Ends(kvlib.Evictor):
    """The first and the last tokens stay, fewer of them in later rows."""

    evicts_in_decode = True

    def budgets(self, view):
        return (5 - torch.arange(len(view.tokens)))[:, None].expand_as(view.lengths)

    def score(self, view):
        rows = torch.arange(len(view.tokens))
        return view.protect(-(view.positions - 7).abs().float(), first=2 - rows, last=3)


def test_protected_tokens_stay_and_no_others():
    model = tiny.model()
    with Ends(0.5)(model) as run:
        logits = model(*tiny.pad([tiny.tokens(20), tiny.tokens(12, seed=1)])).logits[:, -1]
        assert tiny.kept(run) == [[[[0, 1, 17, 18, 19]] * 2] * 2, [[[0, 9, 10, 11]] * 2] * 2]
        tiny.decode(model, run, logits, new=3)
        assert tiny.kept(run) == [[[[0, 1, 19, 20, 21]] * 2] * 2, [[[0, 11, 12, 13]] * 2] * 2]


@pytest.mark.parametrize("share", [0.29, 0.3, 0.57, 0.999, 1e-3])
def test_a_share_is_rounded_down_to_at_least_one_token(share):
    model = tiny.model()
    for length in (1, 7, 10, 100):
        with Table(share)(model) as run:
            model(tiny.tokens(1, length))
        assert run.kept(0).shape[-1] == max(1, int(share * length))


@dataclass(frozen=True)
class Watch(kvlib.Evictor):
    """Accumulates the attention of all queries, and remembers that of the prompt's last ones, four fewer in row 1."""

    window = 6

    def observe(self, view):
        view.state["all"] = view.state.get("all", 0) + view.column_sums().transpose(2, 3)
        if view.step.ends_prompt:
            last = 6 - 4 * torch.arange(len(view.tokens))
            view.state["last"] = view.column_sums(last=last).transpose(2, 3)

    def score(self, view):
        return view.state["all"].sum(-1)


@everywhere
@pytest.mark.parametrize("chunk", [None, 1, 4, 20])
def test_column_sums_are_those_of_the_stock_model_s_attention(architecture, chunk):
    model, rows = tiny.model(architecture), [tiny.tokens(21), tiny.tokens(13, seed=1)]
    with Watch(NEVER)(model) as run:
        turn = tiny.generate(model, run, rows, new=3, extra=1, chunk=chunk)
    with properties.eager(model):
        for row, length in enumerate((21, 13)):
            text = turn.ids[row][turn.mask[row] == 1][None, :-1]  # the last sampled token has not been read
            weights = model(text, output_attentions=True).attentions
            for layer, matrix in zip(run.cache.layers, weights, strict=True):
                matrix = matrix[0].unflatten(0, (model.config.num_key_value_heads, -1))
                last = matrix[:, :, length - (6 - 4 * row) : length].sum(2)
                for name, sums in (("all", matrix.sum(2)), ("last", last)):
                    got = tiny.remembered(layer, name)[row, :, : length + 2].transpose(1, 2)
                    torch.testing.assert_close(got, sums, rtol=0, atol=2e-6)


def test_every_pass_says_where_it_stands():
    steps = []

    @dataclass(frozen=True)
    class Noting(kvlib.Evictor):
        def attend(self, view):
            step = view.step
            if view.layer_idx == 1:
                numbers = step.tokens.tolist(), step.prompt_tokens.tolist(), step.counts.tolist()
                steps.append((step.index, step.decoding, step.ends_prompt, step.seen, *numbers))
            return super().attend(view)

    model = tiny.model()
    with Noting()(model) as run:
        turn = tiny.generate(model, run, [tiny.tokens(5), tiny.tokens(3, seed=1)], new=3, chunk=4)
        tiny.generate(model, run, [tiny.tokens(2), tiny.tokens(2)], new=2, before=turn)
    assert steps == [
        (0, False, False, 4, [4, 2], [4, 2], [4, 2]),
        (0, False, True, 5, [5, 3], [5, 3], [1, 1]),
        (1, True, False, 6, [6, 4], [5, 3], [1, 1]),
        (2, True, False, 7, [7, 5], [5, 3], [1, 1]),
        (0, False, True, 10, [10, 8], [10, 8], [3, 3]),
        (1, True, False, 11, [11, 9], [10, 8], [1, 1]),
    ]


def test_a_method_that_shortens_the_prompt_cannot_fork_even_if_it_does_not_say_so():
    class Silent(kvlib.Evictor):
        def before_layer(self, run, layer_idx):
            return None

    model = tiny.model()
    snapshot = kvlib.snapshot(model, tiny.tokens(1, 9))
    with (
        Silent()(model) as run,
        pytest.raises(ValueError, match="changes the prefill and cannot start from a snapshot"),
    ):
        run.fork(snapshot)
