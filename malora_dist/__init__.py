"""Distributed expert-parallel training of MALoRA (Mixture of Asymmetric Low-Rank Adaptation)."""

__version__ = "0.1.0"
