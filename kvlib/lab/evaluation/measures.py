"""What a study measures: modules whose `evaluate` makes rows of a result table, and the protocols that each knows."""

from kvlib.lab.evaluation import drift, evaluate, recall, running, sinks, stepwise

MEASURES = {
    "answers": evaluate,
    "sinks": sinks,
    "stepwise": stepwise,
    "drift": drift,
    "recall": recall,
    "running": running,
}
PROTOCOLS = {
    "answers": evaluate.PROTOCOLS,
    "sinks": evaluate.PROTOCOLS,
    "stepwise": stepwise.PROTOCOLS,
    "drift": tuple(drift.PROTOCOLS),
    "recall": recall.PROTOCOLS,
    "running": tuple(running.PROTOCOLS),
}
