"""Fused sampling kernels for score-based (diffusion) models."""

__version__ = "0.1.0"
