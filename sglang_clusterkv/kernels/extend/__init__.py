"""Prefill attention of new tokens over their prefix and themselves, on the CPU (a GPU has SGLang's own)."""
