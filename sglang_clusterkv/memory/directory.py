"""Which logical pages have one of the few device pages: tables on the device, read and written on the forward stream only.

A *logical* page is what SGLang allocates, and where its host row is; a *device* page is a place in the pool's buffers. Readers
read a page from either tier; only a write needs a device page. So the host never knows which pages are resident, only how
many free ones are in the ring, from which the next forward's pages are taken.
"""

from __future__ import annotations

import torch

# What `page_of` says of a device page that no logical page has.
FREE = -1
IN_RING = -2
PADDING = -3  # device page 0, where what is written to logical page 0 ends

PLACE_BITS = 20  # of `touch`: a page's place in its row
_MOST_PLACE = (1 << PLACE_BITS) - 1
_NEVER_LEAVES = torch.iinfo(torch.int64).max


class Directory:
    """The page tables of one pool.

    Methods with tensors are device work, for the forward stream; those with plain integers are the host's, at launch. So a
    stream may lag: the places in the ring are known before the work is done. Nothing here waits for the device, and nothing
    that `put` needs is allocated then but its index of the ring's places.

    Args:
        logical_pages: L; pages 1 to L are real, page 0 is padding.
        device_pages: d, likewise.
        ring_pages: device pages that are kept free for the next forward, R <= d.
        page_size: tokens per page.
        device: where the tables live.

    Attributes:
        device_page: int64 [L + 1], logical page -> device page; 0: none.
        page_of: int64 [d + 1], its inverse; FREE, IN_RING or PADDING where no page has it.
        stored: bool [L + 1], the page's host row equals it.
        touch: int64 [L + 1], how much later than others a page leaves: `stamp` of the launch that wrote or found it.
        ring: int64 [R], device pages that are free and clean, `ring_level` of them from `head` on, going round.
        ring_level: how many; a host integer.
    """

    def __init__(self, logical_pages: int, device_pages: int, ring_pages: int, page_size: int, device: str) -> None:
        if not 0 < ring_pages <= device_pages <= logical_pages:
            raise ValueError(
                f"a ring of {ring_pages}, {device_pages} device pages and {logical_pages} logical pages do not go together"
            )
        self.logical_pages, self.device_pages, self.ring_pages = logical_pages, device_pages, ring_pages
        self.page_size = page_size
        self.device_page = torch.zeros(logical_pages + 1, dtype=torch.int64, device=device)
        self.page_of = torch.full((device_pages + 1,), FREE, dtype=torch.int64, device=device)
        self.stored = torch.zeros(logical_pages + 1, dtype=torch.bool, device=device)
        self.touch = torch.zeros(logical_pages + 1, dtype=torch.int64, device=device)
        self.ring = torch.zeros(ring_pages, dtype=torch.int64, device=device)
        self._places = torch.arange(2 * ring_pages, device=device) % ring_pages  # of the ring, twice round
        self._taken = torch.zeros(ring_pages, dtype=torch.int64, device=device)  # scratch of `put`
        self.head = self.ring_level = 0
        self.clear()

    @property
    def bytes(self) -> int:
        """Bytes of the tables."""
        tables = (self.device_page, self.page_of, self.stored, self.touch, self.ring, self._places, self._taken)
        return sum(table.numel() * table.element_size() for table in tables)

    # -- host, at launch ------------------------------------------------------------------------------------------

    def take(self, pages: int) -> int:
        """Take so many pages off the ring; returns their first place, for `put` or `bring`.

        Raises RuntimeError where the ring holds fewer: a forward behind this would write to no page.
        """
        if pages > self.ring_level:
            raise RuntimeError(
                f"clusterkv: {pages} device pages are needed and {self.ring_level} are free: the device tier of "
                f"{self.device_pages} pages is too small for this batch, or pages could not be stored (the log has why): lower "
                "host_ratio or --max-total-tokens"
            )
        first = self.head
        self.head = (self.head + pages) % self.ring_pages
        self.ring_level -= pages
        return first

    @property
    def tail(self) -> int:
        """The place in the ring that is filled next."""
        return (self.head + self.ring_level) % self.ring_pages

    def filled(self, pages: int) -> None:
        """So many pages were appended to the ring: the last step of a refill, after which they may be taken."""
        self.ring_level += pages

    def emptied(self) -> None:
        """The allocator was cleared: the host's part of `clear`, which may lag."""
        self.head, self.ring_level = 0, self.ring_pages

    # -- device, in launch order ----------------------------------------------------------------------------------

    def clear(self) -> None:
        """No page is allocated: the ring is full, every other device page is free."""
        self.emptied()
        self.clear_tables()

    def clear_tables(self) -> None:
        """The device's part of `clear`."""
        self.device_page.zero_()
        self.stored.zero_()
        self.touch.zero_()
        self.page_of.fill_(FREE)
        self.page_of[0] = PADDING
        torch.arange(1, self.ring_pages + 1, out=self.ring)
        self.page_of[1 : self.ring_pages + 1] = IN_RING

    def map(self, new_pages: torch.Tensor, touch: int = 0) -> None:
        """Give pages that were handed out (int64 [n], different ones) device pages from the ring: `take` and `put`."""
        self.put(new_pages, self.take(new_pages.numel()), touch)

    def put(self, pages: torch.Tensor, first: int, touch: int) -> None:
        """Give pages (int64 [n], different ones) the device pages at places `first`, ... of the ring, which were taken.

        What they held before is gone: an older device page of theirs is free, and their host rows are stale.
        """
        count = pages.numel()
        taken = self._taken[:count]
        torch.index_select(self.ring, 0, self._places[first : first + count], out=taken)
        self._release(pages)
        self.device_page.index_copy_(0, pages, taken)
        self.page_of.index_copy_(0, taken, pages)
        self.touch.index_fill_(0, pages, touch)

    def unmap(self, pages: torch.Tensor) -> None:
        """Pages (int64 [n]) were freed: their device pages are free, their host rows void."""
        self._release(pages)
        self.device_page.index_fill_(0, pages, 0)

    def _release(self, pages: torch.Tensor) -> None:
        self.page_of.index_fill_(0, self.device_page.index_select(0, pages), FREE)
        self.page_of[0] = PADDING
        self.stored.index_fill_(0, pages, False)

    def victims(self, count: int, pinned: torch.Tensor, clean_only: bool = False) -> torch.Tensor:
        """The `count` device pages of least value, int64 [count]: free ones, then the least touched.

        Args:
            count: at most as many as are neither in the ring nor pinned.
            pinned: int64 [n], logical pages that stay; those without a device page and page 0 may be among them.
            clean_only: leave out pages whose host row is not stored; then there may be fewer.
        """
        page = self.page_of.clamp(min=0)
        value = self.touch.index_select(0, page)
        value.masked_fill_(self.page_of == FREE, -1)
        value.masked_fill_(self.page_of < FREE, _NEVER_LEAVES)
        if clean_only:
            value.masked_fill_((self.page_of > 0) & ~self.stored.index_select(0, page), _NEVER_LEAVES)
        value.index_fill_(0, self.device_page.index_select(0, pinned), _NEVER_LEAVES)
        chosen = torch.sort(value, stable=True)
        if clean_only:
            count = min(count, int((chosen.values < _NEVER_LEAVES).sum()))
        return chosen.indices[:count]

    def pages_on(self, device_pages: torch.Tensor) -> torch.Tensor:
        """The logical pages that have these device pages (int64 [n]); 0 where none has."""
        return self.page_of.index_select(0, device_pages).clamp(min=0)

    def drop(self, device_pages: torch.Tensor) -> None:
        """The pages that have these device pages (int64 [n]) lose them; their host rows are stored."""
        pages = self.pages_on(device_pages)
        self.stored.index_fill_(0, pages, True)
        self.stored[0] = False  # where a device page was free
        self.device_page.index_fill_(0, pages, 0)
        self.page_of.index_fill_(0, device_pages, FREE)

    def append(self, device_pages: torch.Tensor, tail: int) -> None:
        """Put free device pages (int64 [n]) at the ring's places `tail`, ...; `filled` makes them takeable."""
        self.ring.index_copy_(0, self._places[tail : tail + device_pages.numel()], device_pages)
        self.page_of.index_fill_(0, device_pages, IN_RING)

    def missing(self, pages: torch.Tensor, first: int) -> torch.Tensor:
        """Let pages (int64 [n], different ones) that have no device page get one of those taken at `first`; the rest is free.

        Returns int64 [n]: the device page to fill from the page's host row, 0 where the page has had one. The pages are
        about to be written: their host rows are stale from now on.
        """
        taken = self.ring.index_select(0, self._places[first : first + pages.numel()])
        had = self.device_page.index_select(0, pages)
        lacks = had == 0
        self.device_page.index_copy_(0, pages, torch.where(lacks, taken, had))
        self.page_of.index_copy_(0, taken, torch.where(lacks, pages, FREE))
        self.stored.index_fill_(0, pages, False)
        return torch.where(lacks, taken, 0)

    def note(self, pages: torch.Tensor, touches: torch.Tensor) -> None:
        """Set the touch of pages, both int64 [n]; equal pages have equal touches."""
        self.touch.index_copy_(0, pages, touches)

    def translate(self, slots: torch.Tensor) -> torch.Tensor:
        """The device slots of logical slots (int64 [n]) that are written; slot 0 for page 0 and where there is none."""
        page = torch.div(slots, self.page_size, rounding_mode="floor")
        device = self.device_page.index_select(0, page)
        return device * self.page_size + torch.where(device > 0, slots - page * self.page_size, 0)


def stamp(launch: int, place: int = _MOST_PLACE) -> int:
    """The touch of a page that a launch wrote or found at a place of its row (in pages); by default the launch's latest."""
    return (launch << PLACE_BITS) + min(place, _MOST_PLACE)
