"""Telling duplicates among very many short texts, in little memory."""

from array import array


class SeenTexts:
    """Texts seen before, by 64 bits of their hash: 12 to 24 bytes each, which a set of texts exceeds tenfold."""

    __slots__ = ("_count", "_slots")

    def __init__(self) -> None:
        self._count = 0
        self._slots = array("Q", bytes(8 * 1024))

    def __len__(self) -> int:
        return self._count

    def add(self, text: str | bytes) -> bool:
        """Remember it; False when it was there."""
        if not _insert(self._slots, hash(text) & 0xFFFF_FFFF_FFFF_FFFF or 1):
            return False
        self._count += 1
        if self._count * 3 > len(self._slots) * 2:
            larger = array("Q", bytes(16 * len(self._slots)))
            for value in self._slots:
                if value:
                    _insert(larger, value)
            self._slots = larger
        return True


def _insert(slots: "array[int]", value: int) -> bool:
    mask = len(slots) - 1
    index = value & mask
    while slots[index]:
        if slots[index] == value:
            return False
        index = (index + 1) & mask
    slots[index] = value
    return True
