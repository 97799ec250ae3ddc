"""Networks relabelled: which permutations of hidden units change nothing, and which brings two networks together."""
