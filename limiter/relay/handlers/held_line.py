"""The unfinished line at the end of what has passed of a stream. It is held back: nothing may be written into it."""

_MAX_HELD_BYTES = 64 << 10
_ENDS = (b"\n", b"\r")


class HeldLine:
    """Lets a stream pass up to the last end of a line. A line of more than 64 KiB passes as it arrives."""

    __slots__ = ("_held", "_last")

    def __init__(self) -> None:
        self._held = b""
        self._last = b"\n\n"  # the end of what has passed

    def feed(self, data: bytes) -> bytes:
        """Take what has arrived, and return what can pass."""
        if self._held:
            data = self._held + data
            self._held = b""
        if not data.endswith(b"\n"):
            end = max(data.rfind(b"\n"), data.rfind(b"\r", 0, -1)) + 1
            if len(data) - end <= _MAX_HELD_BYTES:
                self._held, data = data[end:], data[:end]
        if data:
            self._last = (self._last + data[-4:])[-4:]
        return data

    def rest(self) -> bytes:
        """Return the last line, which no line's end followed, at the end of the stream."""
        rest, self._held = self._held, b""
        if rest:
            self._last = (self._last + rest[-4:])[-4:]
        return rest

    def break_off(self) -> bytes:
        """Drop the unfinished line, as the stream broke off within it; return what ends the event before it."""
        self._held = b""
        return self.blank()

    def blank(self) -> bytes:
        """Return what must follow so that a new event can begin: nothing after a blank line."""
        ends = self._last.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        self._last = b"\n\n"
        return b"" if ends.endswith(b"\n\n") else b"\n" if ends.endswith(b"\n") else b"\n\n"
