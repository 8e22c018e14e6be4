"""Measurements of the attention operator: what `nsa bench` runs."""
