"""Layers, optimisers and the gradient check."""
