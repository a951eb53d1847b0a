"""What the result tables hold: the configurations of each lesson, and the studies made of them."""

from kvlib.lab import tasks
from kvlib.lab.evaluation.configuration import Configuration
from kvlib.lab.results.anchored_studies import ANCHORED
from kvlib.lab.results.field_studies import FIELD
from kvlib.lab.results.study import FULL, Study, others, with_arguments

HOSTS = ("h2o", "scissorhands", "snapkv")
SCORES = ("forced_sinks", "vatp", "exact_error", "output_norm")
METHODS = (
    "random", "streaming_llm", "h2o", "scissorhands",
    "snapkv", ("snapkv", {"window": 64, "kernel": 5, "pooling": "avg"}),
    ("snapkv", {"window": 8, "kernel": 15}),  # tuned: chosen on eight prompts of `number`, of 1 024 tokens
    "pyramidkv", "tova", "knorm", ("knorm", {"recent": 32}),
)  # fmt: skip
BASELINES = (  # which decide claims
    FULL,
    *(Configuration(m, b) for m in ("random", "streaming_llm", "h2o", "snapkv") for b in (0.05, 0.2, 0.8)),
    *(Configuration("knorm", b) for b in (0.1, 0.5, 0.8)),
    Configuration("snapkv", 0.05, '{"kernel": 15}'),
    Configuration("streaming_llm", 0.2, '{"renumber": false}'),
    Configuration("streaming_llm", 0.2, '{"sinks": 0}'),
)
VALUES = (  # likewise
    *with_arguments("h2o", (0.05, 0.1, 0.2, 0.5, 0.8)),
    *with_arguments("vatp", (0.05, 0.1, 0.2, 0.5, 0.8), host="h2o"),
    *(c for norm in ("l2", "linf") for c in with_arguments("vatp", (0.5,), host="h2o", norm=norm)),
    *with_arguments("vatp", (0.5,), host="h2o", sinks=0),
    *with_arguments("exact_error", (0.2,), host="h2o"),
    *with_arguments("exact_error", (0.2,), host="h2o", sinks=20),
    *with_arguments("output_norm", (0.5,), host="h2o", sinks=20),
    Configuration("scissorhands", 0.5),
    *with_arguments("vatp", (0.05, 0.2, 0.5), host="scissorhands"),
    *with_arguments("snapkv", (0.05, 0.2, 0.5)),
    *with_arguments("vatp", (0.05, 0.2, 0.5), host="snapkv"),
    *with_arguments("vatp", (0.05, 0.2), host="snapkv", sinks=0),
    *(c for host in HOSTS for c in with_arguments("forced_sinks", (0.05, 0.2, 0.5), host=host)),
)
ON_HOSTS = (*HOSTS, *((score, {"host": host}) for host in HOSTS for score in SCORES))
LATER = (FULL, Configuration("h2o", 0.2), Configuration("snapkv", 0.2))
ANSWERED, READ = tuple(tasks.NATURAL), tuple(tasks.LABEL_FREE)
ABLATED = tuple(
    c
    for host in HOSTS
    for arguments in ({"norm": "l2"}, {"norm": "linf"}, {"sinks": 0}, {"sinks": 1}, {"sinks": 4})
    for c in with_arguments("vatp", (0.2, 0.5), host=host, **arguments)
    if c not in VALUES
)
# Selection layers that answer most on other prompts, for sets per KV head and for all heads. For sets per query head
# they and [2, 8] answer as many there (data/calibration/smollm2/tidaldecode.json).
CHOSEN = [2, 14]
LESS_IS_MORE = {"selection_layers": CHOSEN, "heads": "all", "sinks": 4, "recent": 0.25}
PAGES = 128  # tokens that Quest reads: the bytes of TidalDecode with a set per KV head and 19 % of 2 048 tokens
READING = (  # which decide claims
    FULL,
    *with_arguments("tidaldecode", (0.05, 0.1, 0.2), selection_layers=CHOSEN),
    *with_arguments("tidaldecode", (0.1,), selection_layers=[2]),
    *with_arguments("tidaldecode", (0.05,), selection_layers=[2, 13]),
    Configuration("tidaldecode", 0.1),
    *with_arguments("tidaldecode", (0.1, 0.19, 0.2), selection_layers=CHOSEN, heads="group"),
    *with_arguments("tidaldecode", (0.1,), selection_layers=CHOSEN, heads="all"),
    *with_arguments("tidaldecode", (0.1,), **LESS_IS_MORE),
    Configuration("quest", 0.05),
    Configuration("quest", PAGES),
    Configuration("h2o", 0.05),
)
READ_TOO = (
    *with_arguments("tidaldecode", (0.05, 0.2), **LESS_IS_MORE),
    Configuration("quest", 0.2),
    *with_arguments("loki", (0.1, 0.2), calibration="smollm2"),
    *with_arguments("loki", (0.1,), rank=64),  # all directions: the best tokens of every layer
    *(Configuration("tokenselect", b) for b in (0.05, 0.1, 0.2)),
    Configuration("streaming_llm", 0.05),
)
IN_ONE_PASS = (  # the same questions, read densely
    FULL,
    *with_arguments("tidaldecode", (0.1,), selection_layers=CHOSEN),
    *with_arguments("tidaldecode", (0.2,), selection_layers=CHOSEN, heads="group"),
    *with_arguments("tidaldecode", (0.1,), **LESS_IS_MORE),
    Configuration("quest", PAGES),
    Configuration("tokenselect", 0.1),
)
CORRECTED = (
    FULL,
    *(c for t in (32, 128) for c in with_arguments("tidaldecode", (0.1,), selection_layers=CHOSEN, correction=t)),
    *with_arguments("tidaldecode", (0.1,), selection_layers=CHOSEN),
    *with_arguments("tidaldecode", (0.1,), **LESS_IS_MORE),
    *with_arguments("tidaldecode", (0.1,), **LESS_IS_MORE, correction=32),
    Configuration("quest", PAGES),
)
SIZES = tuple(  # a few tokens to half of them, and whose choice it is
    c
    for k in (16, 64, 256, 1024)
    for c in (
        *with_arguments("tidaldecode", (k,), selection_layers=CHOSEN),
        *with_arguments("tidaldecode", (k,), selection_layers=CHOSEN, heads="group"),
        *with_arguments("tidaldecode", (k,), selection_layers=CHOSEN, heads="all"),
        Configuration("quest", k),
    )
)
DECODED = (  # every token of a text
    FULL,
    *with_arguments("tidaldecode", (64,), selection_layers=CHOSEN),
    *with_arguments("tidaldecode", (64,), **LESS_IS_MORE),
    Configuration("quest", 64),
    Configuration("h2o", 64),
)
READING_MINILM = (  # minilm: the choice is that of both sweeps, its query heads share no keys
    FULL,
    *with_arguments("tidaldecode", (0.05, 0.1, 0.2), selection_layers=[2, 11]),
    *with_arguments("tidaldecode", (0.1,), selection_layers=[2]),
    *with_arguments("tidaldecode", (0.05,), selection_layers=[2, 10]),
    Configuration("tidaldecode", 0.1),
    *with_arguments("tidaldecode", (0.1,), **LESS_IS_MORE | {"selection_layers": [2, 11]}),
    Configuration("quest", 0.05),
    Configuration("h2o", 0.05),
)
NARROW = {"window": 8}  # SnapKV's, in the release of UNComp
GROUPED = (  # which decide claims; 4.74 % for every query head, as theirs, are 19 % of a cache with grouped heads
    FULL,
    *(Configuration("uncomp", b) for b in (0.0474, 0.19, 0.2)),
    *with_arguments("uncomp", (0.2,), spread=0.0),  # all heads alike: the control
    *with_arguments("uncomp", (0.2,), statistic="full"),
    *with_arguments("uncomp", (0.2,), types="smollm2"),
    Configuration("uncomp_random", 0.2),
    Configuration("uncomp_reversed", 0.2),
    Configuration("uncomp_continuous", 0.2),
    *with_arguments("adakv", (0.2,), **NARROW),
    *(Configuration("uncomp_stage", b) for b in (192, 0.2)),
    *(Configuration(m, 0.2) for m in ("snapkv", "pyramidkv", "h2o", "uncomp_pyramidkv", "uncomp_h2o")),
)
GROUPED_TOO = (
    *(Configuration(m, b) for m in ("uncomp", "uncomp_random", "uncomp_reversed") for b in (0.1, 0.5)),
    *(Configuration(m, b) for m in ("uncomp_continuous", "uncomp_stage", "snapkv", "pyramidkv") for b in (0.1, 0.5)),
    *with_arguments("uncomp", (0.1, 0.5), spread=0.0),
    *with_arguments("adakv", (0.1, 0.5), **NARROW),
    *with_arguments("snapkv", (0.2,), **NARROW),
    *with_arguments("vatp", (0.2,), host="snapkv"),
    *(
        c
        for statistic in ("renormalised", "participation")
        for c in with_arguments("uncomp", (0.2,), statistic=statistic)
    ),
    *(c for seed in (1, 2) for c in with_arguments("uncomp_random", (0.2,), seed=seed)),
    *with_arguments("uncomp", (0.2,), spread=1 / 3),
    *(
        c
        for groups, spread in ((2, 1 / 3), (8, 2 / 3))
        for c in with_arguments("uncomp", (0.2,), types="smollm2", across=True, groups=groups, spread=spread)
    ),
    *with_arguments("uncomp_random", (0.2,), across=True, groups=8),
    *with_arguments("uncomp_stage", (0.2,), spread=0.0),
    *with_arguments("uncomp_stage", (0.2,), spread=0.0, shortest=0.7),
    *(c for m in ("uncomp", "uncomp_random", "uncomp_reversed") for c in with_arguments(m, (0.2,), spread=0.95)),
)
EXTREME = {"groups": 2, "spread": 0.95}  # as 512 and 12 tokens, in the first version's table
GROUPED_MINILM = (  # minilm: eight heads, which share no keys
    FULL,
    *(Configuration("uncomp", b) for b in (0.1, 0.2, 0.5)),
    *with_arguments("uncomp", (0.2,), spread=0.0),
    *with_arguments("uncomp", (0.2,), groups=2, spread=1 / 3),
    *(c for groups in (2, 4) for c in with_arguments("uncomp", (0.2,), groups=groups)),
    *with_arguments("uncomp", (0.2,), statistic="full"),
    *with_arguments("uncomp", (0.2,), types="minilm"),
    *(Configuration(m, 0.2) for m in ("uncomp_random", "uncomp_reversed", "uncomp_continuous")),
    *(c for m in ("uncomp", "uncomp_random", "uncomp_reversed") for c in with_arguments(m, (0.2,), **EXTREME)),
    *with_arguments("adakv", (0.2,), **NARROW),
    *(Configuration(m, 0.2) for m in ("snapkv", "pyramidkv", "h2o", "uncomp_pyramidkv", "uncomp_h2o", "uncomp_stage")),
)
GROUPED_MINILM_TOO = (
    *with_arguments("uncomp", (0.1, 0.5), spread=0.0),
    *(Configuration(m, b) for m in ("uncomp_random", "uncomp_reversed") for b in (0.1, 0.5)),
    *(
        c
        for statistic in ("renormalised", "participation")
        for c in with_arguments("uncomp", (0.2,), statistic=statistic)
    ),
    *(c for seed in (1, 2) for c in with_arguments("uncomp_random", (0.2,), seed=seed)),
    *with_arguments("uncomp", (0.2,), groups=4, spread=1 / 3),
    *with_arguments("uncomp", (0.2,), spread=1 / 3),
    *with_arguments("uncomp_stage", (0.2,), spread=0.0),
    *(c for groups in (2, 8) for c in with_arguments("uncomp", (0.2,), types="minilm", across=True, groups=groups)),
)
STUDIES = {
    "00_real": Study(
        tasks=ANSWERED,
        length=2048,
        configurations=BASELINES,
        fewer=others(*METHODS, beside=BASELINES),
        models={"smollm2": 100},
    ),
    "00_real_texts": Study(
        tasks=READ,
        length=2048,
        configurations=(*BASELINES, *others(*METHODS, beside=BASELINES)),
        models={"smollm2": 50},
    ),
    "00_real_later": Study(
        tasks=ANSWERED,
        length=2048,
        configurations=LATER,
        fewer=tuple(c for c in others(*METHODS, beside=LATER) if c.budget > 0.1),
        models={"smollm2": 100},
        protocol="later",
    ),
    "00_real_4096": Study(
        tasks=ANSWERED,
        length=4096,
        configurations=(
            FULL,
            *(
                Configuration(m, b)
                for m in ("random", "streaming_llm", "h2o", "snapkv", "pyramidkv", "tova", "knorm")
                for b in (0.2, 0.5)
            ),
        ),
        models={"smollm2": 50},
    ),
    "01_real": Study(
        tasks=ANSWERED,
        length=2048,
        configurations=VALUES,
        fewer=others(*ON_HOSTS, beside=VALUES),
        models={"smollm2": 100},
    ),
    "01_real_sinks": Study(
        tasks=ANSWERED,
        length=2048,
        configurations=(FULL,),
        models={"smollm2": 10},
        measure="sinks",
    ),
    "01_real_texts": Study(
        tasks=READ,
        length=2048,
        configurations=(*VALUES, *others(*ON_HOSTS, beside=VALUES)),
        models={"smollm2": 40},
    ),
    "00_kv_cache": Study(
        tasks=(*tasks.FAMILIES, "code_bits"),
        length=2048,
        configurations=BASELINES,
        fewer=others(*METHODS, beside=BASELINES),
        models={"minilm": 200},
    ),
    "01_vatp": Study(
        tasks=tuple(tasks.FAMILIES),
        length=2048,
        configurations=(FULL, *VALUES),
        fewer=(*others(*ON_HOSTS, beside=VALUES), *ABLATED),
        models={"minilm": 200},
    ),
    "01_vatp_bits": Study(
        tasks=("code_bits",),
        length=2048,
        configurations=(FULL, *VALUES),
        models={"minilm": 100},
    ),
    "02_real": Study(
        tasks=ANSWERED,
        length=2048,
        configurations=GROUPED,
        fewer=GROUPED_TOO,
        models={"smollm2": 200},
    ),
    "02_uncomp": Study(
        tasks=tuple(tasks.FAMILIES),
        length=2048,
        configurations=GROUPED_MINILM,
        fewer=GROUPED_MINILM_TOO,
        models={"minilm": 200},
    ),
    "04_real_stepwise": Study(
        tasks=ANSWERED,
        length=2048,
        configurations=READING,
        fewer=READ_TOO,
        models={"smollm2": 200},
        protocol="later-stepwise",
        measure="stepwise",
    ),
    **{
        name: Study(tasks=ANSWERED, length=2048, configurations=IN_ONE_PASS, models={"smollm2": 50}, protocol=protocol)
        for name, protocol in (("04_real", "asked"), ("04_real_later", "later"))
    },
    "04_real_sizes": Study(
        tasks=ANSWERED,
        length=2048,
        configurations=(FULL, *SIZES),
        models={"smollm2": 50},
        protocol="later-stepwise",
        measure="stepwise",
    ),
    **{
        f"04_running_{last}": Study(
            tasks=("prose_bits",),
            length=1152,  # the shortest of these prompts has 1 055 tokens
            configurations=DECODED,
            models={"smollm2": 200},
            protocol=f"tokens {first}-{last}",
            measure="running",
        )
        for first, last in ((65, 256), (257, 512), (513, 1024))
    },
    "04_tidaldecode": Study(
        tasks=tuple(tasks.FAMILIES),
        length=2048,
        configurations=READING_MINILM,
        fewer=(
            *with_arguments("tidaldecode", (0.1,), selection_layers=[2, 11], heads="all"),
            Configuration("quest", 0.1),
            *with_arguments("loki", (0.1,), rank=32),  # all directions
            Configuration("tokenselect", 0.1),
        ),
        models={"minilm": 200},
        protocol="later-stepwise",
        measure="stepwise",
    ),
    "04_real_texts": Study(
        tasks=READ,
        length=2048,
        configurations=(*IN_ONE_PASS, Configuration("quest", 0.1), Configuration("h2o", 0.1)),
        models={"smollm2": 200},
    ),
    "04_recall": Study(
        tasks=("number",),
        length=2048,
        configurations=(
            *with_arguments("tidaldecode", (0.1,), selection_layers=[2]),
            *with_arguments("tidaldecode", (0.1,), selection_layers=[2], heads="all"),
            *(c for r in range(3, 30) for c in with_arguments("tidaldecode", (0.1,), selection_layers=[2, r])),
            *with_arguments("tidaldecode", (0.1,), selection_layers=CHOSEN, heads="group"),
            *with_arguments("tidaldecode", (0.1,), selection_layers=CHOSEN, heads="all"),
            *with_arguments("tidaldecode", (0.1,), **LESS_IS_MORE),
            *(Configuration("quest", b) for b in (0.1, PAGES)),
            *with_arguments("loki", (0.1,), calibration="smollm2"),
            *with_arguments("loki", (0.1,), rank=64),
            Configuration("tokenselect", 0.1),
        ),
        models={"smollm2": 200},
        protocol="dense steps",
        measure="recall",
    ),
    **{
        f"04_drift_{last}": Study(
            tasks=("prose_bits",),
            length=1024,
            configurations=CORRECTED,
            models={"smollm2": 50},
            protocol=f"steps {first}-{last}",
            measure="drift",
        )
        for first, last in ((1, 64), (65, 128), (129, 256), (257, 512))
    },
    **ANCHORED,
    **FIELD,
}
