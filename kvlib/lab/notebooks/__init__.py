"""Tools that run the notebooks, store their outputs, and tell whether stored outputs are still true."""
