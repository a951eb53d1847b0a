"""What the tables of the comparison hold: the systems that the four papers stand among, and what several make together.

The baselines have answered the same questions in the tables of other lessons; here are those whose rows are missing
there.
"""

from kvlib.lab import tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.results.study import BUDGETS, FULL, Study, with_arguments

REPEAT = [48010, 260, 1694, 2120, 28, 2229, 327, 2229, 42, 198]  # SmolLM2's "Repeat the text above, word for word:"
TOKENS = (  # at every budget
    *((name, {}) for name in (
        "keydiff", "expected_attention", "critical_kv", "defensive_kv", "lagkv", "keyformer", "kvzip", "kv_compress",
        "elastic_cache", "subgen", "adaptive",
    )),
    ("adaptive", {"host": "vatp"}),
)  # fmt: skip
STORES = (  # all tokens, in fewer bytes; or as many tokens as a rule of its own wants
    *((name, {}) for name in ("int8", "kivi", "think", "minicache", "lorc", "eigen_attention", "cskv")),
    ("kivi", {"bits": 4}),
    ("think", {"ratio": 0.7}),
    ("lorc", {"most": 0.95, "least": 0.75}),
    ("eigen_attention", {"rank": 0.75}),
    ("cskv", {"keys": 0.75, "values": 0.75}),
    ("corm", {}),
    ("corm", {"window": 64, "recent": 64}),
    *(("zipvl", {"tau": tau}) for tau in (0.5, 0.9, 0.975)),
    ("subgen_sampled", {}),
)
TOGETHER = (  # (budgets of the evictor, what it is combined with)
    ((0.2, 0.39, 0.97), {"evictor": "snapkv", "store": "int8"}),
    ((0.2, 0.5, 0.9), {"evictor": "snapkv", "store": "kivi"}),
    ((0.5,), {"evictor": "adakv", "store": "kivi"}),
    ((0.39,), {"evictor": "expected_attention", "store": "int8"}),
    ((0.5,), {"evictor": "keydiff", "store": "kivi"}),
    ((0.25,), {"evictor": "snapkv", "store": "think"}),
    ((0.39,), {"evictor": "h2o", "store": "int8"}),
    ((0.19, 0.39), {"evictor": "kvzip", "store": "int8"}),
    ((0.19, 0.39), {"evictor": "defensive_kv", "store": "int8"}),
    *(((0.39,), {"evictor": name, "store": "int8"}) for name in ("uncomp", "streaming_llm", "lagkv", "kv_compress")),
    ((0.5,), {"evictor": "snapkv", "reader": "loki", "read": 0.1}),
)


def low_rank(model: str, share: float) -> list[Configuration]:
    return with_arguments("cskv", (1.0,), keys=share, values=share, calibration=model)


def shared(model: str) -> list[Configuration]:
    """Layers of the calibration, and of both controls."""
    orders = {}, {"order": "similar"}, {"order": "random"}
    return [c for order in orders for c in with_arguments("kvsharer", (1.0,), pairs=model, **order)]


SYSTEMS = (
    *(c for name, arguments in TOKENS for c in with_arguments(name, BUDGETS, **arguments)),
    *(c for name, arguments in STORES for c in with_arguments(name, (1.0,), **arguments)),
    *(c for share in (0.5, 0.75) for c in low_rank("smollm2", share)),
    *with_arguments("kvzip", (0.2,), prompt_ids=REPEAT),
    *shared("smollm2"),
    *(c for budgets, arguments in TOGETHER for c in with_arguments("combined", budgets, **arguments)),
)
SYSTEMS_MINILM = (  # which has a calibration for Eigen Attention
    *(c for name, arguments in TOKENS for c in with_arguments(name, BUDGETS, **arguments)),
    *(c for name, arguments in STORES for c in with_arguments(name, (1.0,), **arguments)),
    *with_arguments("eigen_attention", (1.0,), calibration="minilm"),
    *(c for share in (0.5, 0.75) for c in low_rank("minilm", share)),
    *shared("minilm"),
    *(
        c
        for host in ("snapkv", "kvzip", "defensive_kv", "h2o")
        for c in with_arguments("combined", (0.39,), evictor=host, store="int8")
    ),
)
KNOWN = ("random", "streaming_llm", "h2o", "snapkv", "pyramidkv", "tova", "knorm", "uncomp", "adakv")
MISSING_LATER = (  # what the table of later questions lacks, of other lessons
    *with_arguments("vatp", BUDGETS, host="h2o"),
    *with_arguments("vatp", BUDGETS, host="snapkv"),
    *(Configuration(name, budget) for name in ("uncomp", "adakv") for budget in BUDGETS),
    *with_arguments("adakv", BUDGETS, window=8),
    *(Configuration(name, 0.1) for name in (*KNOWN[:7], "scissorhands")),
    *with_arguments("snapkv", (0.1,), window=8, kernel=15),
)
MISSING_MINILM = (  # of which no table has later questions
    *(Configuration(name, budget) for name in KNOWN for budget in BUDGETS),
    *with_arguments("vatp", BUDGETS, host="h2o"),
)
SPELLED = (  # a needle in fewer tokens: methods at a fifth, and what others store
    FULL,
    *(Configuration(name, 0.2) for name in (
        "h2o", "snapkv", "uncomp", "kvzip", "defensive_kv", "critical_kv", "kv_compress", "keydiff",
    )),
    Configuration("int8", 1.0),
    Configuration("kivi", 1.0, '{"bits": 4}'),
    *with_arguments("combined", (0.39,), evictor="snapkv", store="int8"),
)  # fmt: skip
SAMPLES = 24
FIELD = {
    "90_real": Study(
        tasks=tuple(tasks.NATURAL),
        length=2048,
        configurations=(FULL, *SYSTEMS),
        models={"smollm2": SAMPLES},
    ),
    "90_real_later": Study(
        tasks=tuple(tasks.NATURAL),
        length=2048,
        configurations=(FULL, *SYSTEMS, *MISSING_LATER),
        models={"smollm2": SAMPLES},
        protocol="later",
    ),
    "90_real_texts": Study(
        tasks=tuple(tasks.LABEL_FREE),
        length=2048,
        configurations=(FULL, *SYSTEMS),
        models={"smollm2": SAMPLES},
    ),
    "90_real_spelled": Study(
        tasks=tuple(tasks.SPELLED),
        length=2048,
        configurations=SPELLED,
        models={"smollm2": 12},
    ),
    "90_comparison": Study(
        tasks=tuple(tasks.FAMILIES),
        length=2048,
        configurations=(FULL, *SYSTEMS_MINILM),
        models={"minilm": 12},
    ),
    "90_comparison_later": Study(
        tasks=tuple(tasks.FAMILIES),
        length=2048,
        configurations=(FULL, *SYSTEMS_MINILM, *MISSING_MINILM),
        models={"minilm": 12},
        protocol="later",
    ),
    "90_bytes": Study(
        tasks=("number",),
        length=2048,
        configurations=(FULL, *SYSTEMS, *(Configuration(name, b) for name in KNOWN for b in BUDGETS)),
        models={"smollm2": 4},
        protocol="bfloat16",
        measure="sixteen bits",
    ),
}
