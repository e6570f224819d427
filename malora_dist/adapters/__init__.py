"""The adapters: maths, start values and parameter budget on plain tensors, no distributed code."""
