"""What recall costs in quality, measured through the serving path: one command for each question."""
