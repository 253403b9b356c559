"""When something is tried again after a fault: later each time in a row, up to 256 launches."""

from __future__ import annotations

from sglang_clusterkv.clusters.rows import Row

_MOST_FAILURES = 8  # in a row, that make the wait for another try longer: 256 launches


class BackOff:
    """Counts launches, and those to wait: before rows are looked at, before layers decode sparsely.

    Attributes:
        launch: of the forward whose head this is.
        from_launch: from which it may be tried.
    """

    def __init__(self) -> None:
        self.launch = 0
        self.from_launch = 0
        self._failures = 0  # in a row

    @property
    def over(self) -> bool:
        """Whether it may be tried in this launch."""
        return self.launch >= self.from_launch

    def succeeded(self) -> None:
        """It went well this time: what went wrong before is over."""
        self._failures = 0

    def failed(self) -> None:
        """It failed: it is not tried for a while."""
        self._failures = min(self._failures + 1, _MOST_FAILURES)
        self.from_launch = self.launch + 2**self._failures

    def row_failed(self, record: Row) -> int:
        """A segment that the row was to see was not made; returns the launch from which the row may be looked at."""
        record.failures = min(record.failures + 1, _MOST_FAILURES)
        return self.launch + 2**record.failures
