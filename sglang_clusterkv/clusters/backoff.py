"""When rows are looked at again after a fault: later each time in a row, up to 256 launches."""

from __future__ import annotations

from sglang_clusterkv.clusters.rows import Row

_MOST_FAILURES = 8  # in a row, that make the wait for another try longer: 256 launches


class BackOff:
    """Counts launches, and those to wait.

    Attributes:
        launch: of the forward whose head this is.
        look_from: launch from which any row may be looked at.
    """

    def __init__(self) -> None:
        self.launch = 0
        self.look_from = 0
        self._failures = 0  # in a row

    @property
    def over(self) -> bool:
        """Whether rows may be looked at in this launch."""
        return self.launch >= self.look_from

    def planned(self) -> None:
        """A plan was made: what went wrong before is over."""
        self._failures = 0

    def failed(self) -> None:
        """Planning failed, or what it needs: no row is looked at for a while."""
        self._failures = min(self._failures + 1, _MOST_FAILURES)
        self.look_from = self.launch + 2**self._failures

    def row_failed(self, record: Row) -> int:
        """A segment that the row was to see was not made; returns the launch from which the row may be looked at."""
        record.failures = min(record.failures + 1, _MOST_FAILURES)
        return self.launch + 2**record.failures
