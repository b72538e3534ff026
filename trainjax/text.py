"""Text that is no Unicode: halves of characters, as a cut in the wrong place leaves them."""

from __future__ import annotations

import re

_HALVES = re.compile("[\ud800-\udfff]")


def whole(text: str) -> str:
    """The text with U+FFFD, the replacement character, for each half of a surrogate pair.

    No tokenizer and no file takes such a half. It comes from JSON (`"\\ud83d"`) that was cut within an emoji,
    and from a terminal whose bytes are not UTF-8. The text keeps its length.

    >>> whole("cut \\ud83d here") == "cut \\ufffd here"
    True
    """
    return _HALVES.sub("\ufffd", text)
