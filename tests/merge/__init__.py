"""Adapters of any method in the whole model: what is promised, and what is refused."""
