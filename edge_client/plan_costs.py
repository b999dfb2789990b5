"""Costs of runs with one model, placement by placement.

Knows which settings leave what was placed as it is, so that a search places little; computes no cost by itself.
"""
