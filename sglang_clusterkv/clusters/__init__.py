"""What happens at the head of a forward: the plan of segments, their build, and the lists of a step (no SGLang here)."""
