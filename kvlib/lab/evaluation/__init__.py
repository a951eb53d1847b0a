"""Evaluation of cache methods: on the tasks, by perplexity, and with real data sets and their metrics."""
