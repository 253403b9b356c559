"""Merge two partial attentions: what attend read exactly, and what the estimate says of the rest."""
