"""What experiments share: tasks, functions, evaluation, results, claims, lessons, notebooks, statistics, plotting."""
