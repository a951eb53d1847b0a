"""What experiments share: tasks, evaluation, statistics, plotting."""
