"""Probabilities to a mask, and how good it is: components, rule, metrics; tables, tuning, trust."""
