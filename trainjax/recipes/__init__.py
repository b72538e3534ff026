"""Jobs, one file each: a frozen dataclass `Config` and `main(config)`. The command line finds them."""

from typing import NewType

Prose = NewType("Prose", str)
"""Text that a model reads: what looks like a path in it is none."""
