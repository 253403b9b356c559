"""Select the clusters whose tokens are candidates."""
