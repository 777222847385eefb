"""Detection of duplicates among very many short texts, in little memory."""

from array import array

_MIN_SLOTS = 1024


class FingerprintSet:
    """A set of texts by 64 bits of their hash: 12 to 24 bytes each, about a tenth of a set of strings.

    expected: the expected number of texts; the set grows beyond it, which takes longer.
    """

    __slots__ = ("_count", "_mask", "_room", "_slots")

    def __init__(self, expected: int = 0) -> None:
        self._count = 0
        self._make_slots(max(_MIN_SLOTS, 1 << (expected * 3 // 2).bit_length()))

    def __len__(self) -> int:
        return self._count

    def add(self, text: str | bytes) -> bool:
        """Add a text; return False if it was in the set already."""
        value = hash(text) & 0xFFFF_FFFF_FFFF_FFFF or 1
        slots, mask = self._slots, self._mask
        index = value & mask
        while found := slots[index]:
            if found == value:
                return False
            index = (index + 1) & mask
        slots[index] = value
        self._count += 1
        if self._count > self._room:
            self._grow()
        return True

    def _grow(self) -> None:
        values = self._slots
        self._make_slots(2 * len(values))
        slots, mask = self._slots, self._mask
        for value in values:
            if value:
                index = value & mask
                while slots[index]:
                    index = (index + 1) & mask
                slots[index] = value

    def _make_slots(self, count: int) -> None:
        self._slots = array("Q", bytes(8 * count))
        self._mask, self._room = count - 1, count * 2 // 3
