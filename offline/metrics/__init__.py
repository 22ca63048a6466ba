"""Metrics of a bank, computed on held-out images; each is one function with its formula and its source."""
