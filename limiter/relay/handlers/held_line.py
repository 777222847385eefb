"""The unfinished line at the end of what has passed of a stream. It is held back: nothing may be written into it."""

_MAX_HELD_BYTES = 64 << 10
_DATA = b"data"


class HeldLine:
    """Lets a stream pass up to the last end of a line. A line of more than 64 KiB passes as it arrives.

    It knows where in an event the stream is, so that an event of the relay's own can follow whatever has passed.
    """

    __slots__ = ("_has_data", "_has_fields", "_held", "_line", "_was_cr")

    def __init__(self) -> None:
        self._held = b""
        self._line = b""  # the beginning of the line that has passed in part
        self._has_fields = self._has_data = False  # of the event that has passed in part
        self._was_cr = False

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
            self._pass(data)
        return data

    def rest(self) -> bytes:
        """Return the last line, which no line's end followed, at the end of the stream."""
        rest, self._held = self._held, b""
        if rest:
            self._pass(rest)
        return rest

    def break_off(self) -> bytes:
        """Drop the unfinished line, as the stream broke off within it; return what must precede an error event.

        What has passed of an event without its data is no event: it goes on, as one that is called an error.
        """
        self._held = b""
        ends = b"\n" if self._line or self._was_cr else b""  # after "\r" it still is of the same line's end
        has_data = self._has_data or self._line.startswith(_DATA)
        has_fields = self._has_fields or bool(self._line)
        self._line, self._has_fields, self._has_data, self._was_cr = b"", False, False, False
        if has_data:
            return ends + b"\n"
        return ends + b"event: error\n" if has_fields else ends

    def comment(self, text: bytes) -> bytes:
        """Return a comment that follows the end of the stream. It ends no event that the stream has left open."""
        is_open = self._has_fields or bool(self._line)
        return (b"\n" if self._line else b"") + b": " + text + (b"\n" if is_open else b"\n\n")

    def _pass(self, data: bytes) -> None:
        """Note where in an event the stream is after what passes now."""
        if data.endswith((b"\n\n", b"\r\n\r\n")):
            self._line, self._has_fields, self._has_data, self._was_cr = b"", False, False, False
            return
        if self._was_cr and data.startswith(b"\n"):
            data = data[1:]
        self._was_cr = data.endswith(b"\r")
        *lines, last = (self._line + data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")).split(b"\n")
        self._line = last[: len(_DATA)]
        for line in lines:
            if not line:
                self._has_fields = self._has_data = False
            elif not line.startswith(b":"):
                self._has_fields = True
                self._has_data = self._has_data or line.startswith(_DATA)
