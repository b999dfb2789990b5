"""Text of a model on standard output.

A peer steers what a model says: on a terminal no character of it may be a command.
"""

import sys

_COMMANDS = {*range(0x20), *range(0x7F, 0xA0)} - set(map(ord, "\n\t"))
_SHOWN_AS = dict.fromkeys(_COMMANDS, "\N{REPLACEMENT CHARACTER}")


def show_text(text: str) -> None:
    """Write text at once, to a terminal without control characters (C0 and C1), to anything else as it is."""
    sys.stdout.write(text.translate(_SHOWN_AS) if sys.stdout.isatty() else text)
    sys.stdout.flush()
