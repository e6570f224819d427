"""How tokens and experts meet across ranks, one class per way."""
