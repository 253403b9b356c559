"""Refine the choice inside the candidate clusters: the best tokens by their codes."""
