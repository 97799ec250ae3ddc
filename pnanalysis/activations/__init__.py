"""TODO activations"""
