"""What a study measures: modules whose `evaluate` makes rows of a result table; protocols and columns of each."""

from kvlib.lab.evaluation import anchored, drift, evaluate, recall, running, sinks, stepwise

MEASURES = {
    "answers": evaluate,
    "sinks": sinks,
    "stepwise": stepwise,
    "drift": drift,
    "recall": recall,
    "running": running,
    "anchored": anchored,
}
PROTOCOLS = {
    "answers": evaluate.PROTOCOLS,
    "sinks": evaluate.PROTOCOLS,
    "stepwise": stepwise.PROTOCOLS,
    "drift": tuple(drift.PROTOCOLS),
    "recall": recall.PROTOCOLS,
    "running": tuple(running.PROTOCOLS),
    "anchored": anchored.PROTOCOLS,
}
EXTRA = {"anchored": anchored.EXTRA}  # columns of their own
