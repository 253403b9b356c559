"""Merge two partial attentions."""
