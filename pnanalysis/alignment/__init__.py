"""Permutations of hidden units: which leave a network's function unchanged, and which brings two networks together."""
