"""Rounds of many edges: integers, masks and signed keys; no transport and no models."""
