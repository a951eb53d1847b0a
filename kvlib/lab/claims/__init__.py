"""What papers claim, and what the result tables say about it."""
