"""The cluster index: page-aligned arrays, the plan that decides segments, and the build that fills them (no SGLang here)."""
