"""What general compressors make of the same bytes, in bits per byte."""

import bz2
import lzma
import zlib
from collections.abc import Callable

_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "lzma": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    "bz2": lambda text: bz2.compress(text, 9),
    "zlib": lambda text: zlib.compress(text, 9),
}


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of `text` alone, each compressor at its strongest setting.

    Example:
        >>> sorted(compressed_bits_per_byte(b"to be or not to be, " * 50))
        ['bz2', 'lzma', 'zlib']
    """
    return {name: 8 * len(press(text)) / len(text) for name, press in _COMPRESSORS.items()}
