"""The contract of a method, and everything that carries it: blocks, views, packed storage, attention."""
