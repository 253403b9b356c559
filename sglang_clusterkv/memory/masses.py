"""Constants of the masses by which clusters and tokens are ranked and estimated (docs/design.md "Exactly")."""

# The most of a cluster's bonus that the estimate counts; docs/quality.md, "Sharp heads", has what others cost.
SPREAD_CAP = 2.0

# A mass below this counts as none: kernels whose exponentials end at other numbers rank what is left alike.
NO_MASS = 1e-30

# A token's mass by its code is not counted as more than this, so that sums of them stay finite.
MOST_MASS = 1e20
