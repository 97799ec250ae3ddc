"""Readers of what may come from strangers, given damaged and made-up input: they read it or say what is wrong."""
