"""See what was recalled: a request's trace, and a page that shows it."""
