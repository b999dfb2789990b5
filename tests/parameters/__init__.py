"""Adapters inside the span whose values cross once a step, and their gradients back."""
