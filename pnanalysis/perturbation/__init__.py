"""How the loss answers to perturbations of the weights: the worst, the average, and to second order."""
