"""The load that agents make, driven against any OpenAI-compatible server: `python -m benchmarks.agents`."""
