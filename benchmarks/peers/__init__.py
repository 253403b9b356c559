"""Other programs on the same machine, to compare with; never part of CI."""
