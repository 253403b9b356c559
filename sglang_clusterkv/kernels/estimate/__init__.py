"""Estimate what was not recalled, by clusters."""
