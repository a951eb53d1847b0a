"""Random conversations: padding, chunks, company, forks and second turns change neither tokens nor keep-sets.

A few examples of every method run with the other tests; `make test-deep` runs a thousand of each.
"""

import os

import properties
import pytest
import test_gate as gate
import tiny
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from properties import Conversation

import kvlib
from kvlib.core.method import Budgeted

DEEP = int(os.environ.get("KVLIB_DEEP_CASES", "1000"))
SNAPKV = {
    "window": st.integers(1, 9),
    "kernel": st.sampled_from([1, 3, 7]),
    "pooling": st.sampled_from(["max", "avg"]),
}
HOSTED = {"host": st.sampled_from(["h2o", "scissorhands", "snapkv", "pyramidkv"]), "sinks": st.integers(0, 9)}
UNCOMP = {
    "window": st.integers(1, 9),
    "kernel": st.sampled_from([1, 3, 5]),
    "groups": st.sampled_from([None, 1]),
    "spread": st.floats(0, 0.9),
}
STAGES = {"starts": st.sampled_from([None, (), (1,)])}
ARGUMENTS = {  # what is drawn besides the budget
    "random": {"seed": st.integers(0, 9)},
    "snapkv": SNAPKV,
    "pyramidkv": {**SNAPKV, "beta": st.integers(1, 25)},
    "forced_sinks": HOSTED,
    "vatp": {**HOSTED, "norm": st.sampled_from(["l1", "l2", "linf"])},
    "exact_error": HOSTED,
    "output_norm": HOSTED,
    "streaming_llm": {"sinks": st.integers(0, 6), "renumber": st.booleans()},
    "tidaldecode": {
        "heads": st.sampled_from(["query", "group", "all"]),
        "sinks": st.integers(0, 6),
        "recent": st.sampled_from([0.0, 0.25, 1.0]),
    },
    "quest": {"page": st.integers(1, 9), "dense": st.integers(0, 1)},
    "loki": {"rank": st.one_of(st.integers(1, 8), st.floats(0.01, 1))},
    "tokenselect": {
        "sinks": st.none() | st.integers(0, 6),
        "recent": st.none() | st.integers(1, 9),
        "similarity": st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    },
    "uncomp": UNCOMP,
    "uncomp_random": {**UNCOMP, "seed": st.integers(0, 9)},
    "uncomp_reversed": UNCOMP,
    "uncomp_h2o": {"spread": st.floats(0, 0.9)},
    "uncomp_pyramidkv": {"window": st.integers(1, 9), "kernel": st.sampled_from([1, 3]), "spread": st.floats(0, 0.9)},
    "adaptive": {"host": st.sampled_from(["h2o", "vatp", "snapkv", "knorm", "keydiff"]), "floor": st.floats(0, 1)},
    "combined": {
        "evictor": st.sampled_from(["h2o", "streaming_llm", "adakv", "keydiff", "tova"]),
        "store": st.sampled_from([None, "int8"]),
        "reader": st.sampled_from([None, "loki"]),
        "read": st.floats(0.1, 1),
    },
    "adakv": {"window": st.integers(1, 9), "kernel": st.sampled_from([1, 3, 5]), "floor": st.floats(0, 1)},
    "cskv": {"keys": st.floats(0.1, 1), "values": st.floats(0.1, 1), "recent": st.integers(1, 9)},
    "eigen_attention": {"rank": st.one_of(st.none(), st.integers(1, 8), st.floats(0.01, 1))},
    "lorc": {"most": st.floats(0.5, 1), "least": st.floats(0.05, 0.5)},
    "kv_compress": {
        "window": st.integers(1, 9),
        "kernel": st.sampled_from([1, 3, 7]),
        "protected": st.integers(0, 9),
    },
    "kvzip": {
        "chunk": st.integers(1, 30),
        "sinks": st.integers(0, 6),
        "layerwise": st.booleans(),
        "prompt_ids": st.sampled_from([(), (5,), (5, 6, 7)]),
    },
    "elastic_cache": {"sinks": st.integers(0, 6), "recent": st.integers(1, 9)},
    "subgen": {"recent": st.integers(0, 9)},
    "subgen_sampled": {
        "samples": st.integers(1, 9),
        "radius": st.sampled_from([0, 0.5, 0.9, 1.3]),
        "per": st.integers(1, 3),
        "seed": st.integers(0, 9),
    },
    "corm": {"window": st.integers(1, 9), "recent": st.integers(1, 9)},
    "keyformer": {"recent": st.floats(0, 1), "growth": st.sampled_from([0.0, 0.5]), "seed": st.integers(0, 9)},
    "zipvl": {"tau": st.floats(0.05, 1)},
    "expected_attention": {"future": st.sampled_from([1, 7, 100]), "sinks": st.integers(0, 6)},
    "critical_kv": HOSTED,
    "defensive_kv": {"window": st.integers(1, 9), "kernel": st.sampled_from([1, 3, 5])},
    "lagkv": {"sinks": st.integers(0, 6), "lag": st.integers(2, 9)},
    "uncomp_stage": {**UNCOMP, **STAGES, "shortest": st.floats(0.1, 1)},
    "uncomp_release": {**UNCOMP, **STAGES, "groups": st.just(1), "shortest": st.floats(0.01, 0.2)},
    "kivi": {
        "bits": st.sampled_from([2, 4]),
        "group": st.sampled_from([4, 8]),
        "residual": st.sampled_from([4, 8, 16, 24]),
    },
    "kvsharer": {"pairs": st.just(((1, 0),))},
    "minicache": {"t": st.floats(0, 1), "gamma": st.floats(0, 1), "start": st.sampled_from([0.0, 0.5])},
    "think": {"ratio": st.floats(0, 0.95), "window": st.integers(1, 9), "recent": st.integers(0, 9)},
}
GATE = [gate.Ragged, gate.RaggedPrompt, gate.Shorten, gate.Reader, gate.Handed]
METHODS = [*sorted(kvlib.METHODS), *GATE]
budgets = st.one_of(st.floats(0.02, 1), st.integers(1, 30))


@st.composite
def methods(draw, choice):
    """A method with random arguments; arguments that it refuses are drawn again."""
    if choice == "full":
        return kvlib.method("full")
    if choice == "anchorcoder":
        per, beyond = draw(st.none() | st.integers(1, 3)), draw(st.none() | st.integers(0, 1))
        arguments = {
            "per": per,
            "beyond": beyond,
            "source": None if beyond is None else 0,
            "spread": draw(st.booleans()),
        }
        return kvlib.method("anchorcoder", anchor=7, forced=False, **arguments)
    make = choice if isinstance(choice, type) else kvlib.METHODS[choice]
    arguments = {name: draw(values) for name, values in ARGUMENTS.get(choice, {}).items()}
    try:
        return make(draw(budgets), **arguments) if issubclass(make, Budgeted) else make(**arguments)
    except ValueError:
        assume(False)


@st.composite
def conversations(draw, chunks: bool):
    return Conversation(
        first=tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))),
        second=draw(st.integers(1, 12)),
        extra=draw(st.integers(0, 6)),
        chunk=draw(st.none() | st.integers(1, 25)) if chunks else None,
        new=draw(st.integers(1, 4)),
        only_new=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def converse(choice, cases: int) -> int:
    """Check random cases of one method; how many there were."""
    count = 0
    # Chunks matter to methods that look at one pass at a time (see test_gate).
    chunks = choice not in (gate.Shorten, gate.Reader, "uncomp_stage", "uncomp_release")

    @settings(max_examples=cases, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
    @given(methods(choice), st.sampled_from(list(tiny.ARCHITECTURES)), conversations(chunks))
    def check(method, architecture, talk):
        nonlocal count
        count += 1
        model = tiny.model(architecture)
        properties.same_alone_and_in_company(model, method, talk)
        if not method.own_prefill:
            properties.fork_continues_like_live(model, method, talk)

    check()
    return count


def label(choice):
    return choice if isinstance(choice, str) else choice.__name__


@pytest.mark.parametrize("choice", METHODS, ids=label)
def test_a_few_random_conversations(choice):
    converse(choice, 7)


@pytest.mark.deep
@pytest.mark.parametrize("choice", [pytest.param(choice, id=f"{label(choice)}: {DEEP} cases") for choice in METHODS])
def test_many_random_conversations(choice):
    assert converse(choice, DEEP) >= DEEP
