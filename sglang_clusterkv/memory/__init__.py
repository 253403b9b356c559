"""What lies where: the cluster index and its lists, keys and values on the device and on the host."""
