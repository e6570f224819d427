"""Adapter methods: declarations, start values and one-process maths; no distributed code."""
