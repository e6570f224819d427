"""Model families, one file each: to add one, write its file and name it here."""

from malora_dist.families import llama

__all__ = ["llama"]
