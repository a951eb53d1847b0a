"""Checks of the exercises, a file for each lesson: each says what is wrong, and prints one line when nothing is.

A check never compares with a hidden answer alone; it says which property is violated and on which input.
"""
