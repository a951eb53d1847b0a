"""What experiments share: tasks, evaluation, results, claims, lessons, the notebook tools, statistics, plotting."""
