"""The pages of the KV cache, as the host accounts for them."""


class BlockPool:
    """Hands out page numbers `0 .. num_pages - 1`, each to one owner at a time. Mutable; owned by the `Scheduler`."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # A stack: a page freed last is the likeliest to be in a cache nearby.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. The caller has checked `num_free`."""
        assert 0 <= count <= len(self._free), f"{count} pages asked for, {len(self._free)} free"
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        taken.reverse()
        return taken

    def free(self, pages: list[int]) -> None:
        """Give pages back, once each."""
        self._free.extend(reversed(pages))
        assert len(self._free) <= self.num_pages, "a page was freed twice"
