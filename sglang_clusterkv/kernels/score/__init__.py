"""Score the clusters of each request against its queries."""
