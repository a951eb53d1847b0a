"""What experiments share: tasks, functions, evaluation, results, claims, lessons, the notebook tools, statistics, plotting."""
