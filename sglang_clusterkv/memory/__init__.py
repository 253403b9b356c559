"""Where the cluster index lives: the device tier (the host tier is a later layer of the same protocol)."""
