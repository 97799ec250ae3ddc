"""Weights as points: distances, planes, curves and the loss on them."""
