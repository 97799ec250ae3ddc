"""Networks over data: forward passes, losses per example, scores, disagreement and CKA."""
