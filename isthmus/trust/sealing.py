"""Sealed files: encrypted and authenticated chunk by chunk, each under a key of its own that a seal's key wraps.

Knows one file's bytes and the key of a seal; knows no passphrase (`isthmus.trust.seal_keys`), and nothing of what is
sealed. A sealed file is, in this order:

    8 bytes   "ISTHSEAL"
    1         version, 1
    1         binary logarithm of the chunk size: 12 to 24
    16        id of the seal
    12        nonce of the file's key
    48        the file's key, encrypted under the seal's; the 38 bytes before it and the purpose are authenticated
    ...       the content in chunks of that size, the last one shorter (or empty), each followed by its tag of 16 bytes

Everything is AES-256-GCM. A chunk's nonce is its number (11 bytes, the highest first) and a byte that is 1 for the last
chunk and 0 for others, as in the STREAM construction (Hoang, Reyhanitabar, Rogaway and Vizar, 2015); authenticated with
it are the file's 86 bytes before the chunks and its purpose: a text that says what the file is and where it belongs. So
a file that is cut off, goes on, has its chunks in another order or those of another file, or stands in another's place,
does not open. That an older file stands where a newer one stood cannot be seen.
"""

import hashlib
import hmac
import io
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from isthmus.durable import write_pieces
from isthmus.errors import BundleError
from isthmus.faults import WritePoints

ENDING = ".sealed"
"""What a sealed file's name ends with."""

MAGIC, VERSION = b"ISTHSEAL", 1
ID_BYTES, KEY_BYTES, NONCE_BYTES, TAG_BYTES = 16, 32, 12, 16
CHUNK_LOG2 = 20
_SMALLEST_LOG2, _LARGEST_LOG2 = 12, 24
_BOUND_BYTES = len(MAGIC) + 2 + ID_BYTES + NONCE_BYTES
HEADER_BYTES = _BOUND_BYTES + KEY_BYTES + TAG_BYTES

Piece = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Seal:
    """What seals files: an id, which each of them names, and the key that wraps theirs."""

    id: bytes
    key: bytes = field(repr=False)

    @classmethod
    def new(cls) -> "Seal":
        """A seal that nobody has yet."""
        return cls(secrets.token_bytes(ID_BYTES), secrets.token_bytes(KEY_BYTES))

    def sealed(self, purpose: str, pieces: Iterable[Piece], chunk_log2: int = CHUNK_LOG2) -> Iterator[bytes]:
        """A sealed file's bytes, piece by piece; holds one chunk, and one piece of what is sealed, at a time."""
        own = secrets.token_bytes(KEY_BYTES)
        nonce = secrets.token_bytes(NONCE_BYTES)
        bound = MAGIC + bytes((VERSION, chunk_log2)) + self.id + nonce
        header = bound + AESGCM(self.key).encrypt(nonce, own, bound + purpose.encode())
        cipher, told = AESGCM(own), header + purpose.encode()
        yield header
        for index, (chunk, last) in enumerate(_chunks(pieces, 1 << chunk_log2)):
            yield cipher.encrypt(_nonce(index, last), chunk, told)

    def write(self, path: Path, purpose: str, pieces: Iterable[Piece], points: WritePoints | None = None) -> None:
        """Seal a file, which is there whole or not at all; tests may kill it at `points`.

        Raises:
            OSError: the disk refuses; what stood at `path` still does.
        """
        write_pieces(path, self.sealed(purpose, pieces), points)

    def read(self, path: Path, purpose: str) -> bytes:
        """All that was sealed in a file.

        Raises:
            BundleError: as `SealedFile`.
            OSError: likewise.
        """
        with SealedFile(path, purpose, self) as file:
            return b"".join(file)

    def opened(self, content: bytes, path: Path, purpose: str) -> bytes:
        """All that was sealed in `content`, which stood in the file at `path` that a message names.

        Raises:
            BundleError: as `SealedFile`.
        """
        with SealedFile(path, purpose, self, io.BytesIO(content)) as file:
            return b"".join(file)

    def name(self, text: str) -> str:
        """64 hexadecimal digits that say nothing of `text` to whoever lacks the key."""
        names = hmac.digest(self.key, b"isthmus names", "sha256")
        return hmac.digest(names, text.encode(), "sha256").hex()


class SealedFile:
    """A sealed file, open to be read in any order; it iterates over its chunks.

    With `stored`, its bytes are in there, and `path` is only what messages name.

    The last chunk is opened first of all, so that a length that is not the file's own is found out before anything is
    read.

    Raises:
        BundleError: it is no sealed file, of another seal or purpose, or damaged; from any method.
        OSError: it cannot be read, or is missing.
    """

    def __init__(self, path: Path, purpose: str, seal: Seal, stored: io.BytesIO | None = None) -> None:
        self._path = path
        self._file = _opened(path) if stored is None else stored
        try:
            header = self._file.read(HEADER_BYTES)
            self._own, log2 = _unwrapped(path, header, purpose, seal)
            self._told, self._chunk_bytes = header + purpose.encode(), 1 << log2
            length = self._file.seek(0, os.SEEK_END) - HEADER_BYTES
            self.chunks = max(1, -(-length // (self._chunk_bytes + TAG_BYTES)))
            self.size = length - self.chunks * TAG_BYTES
            self.chunk(self.chunks - 1)
        except BaseException:
            self._file.close()
            raise

    def chunk(self, index: int) -> bytes:
        """The content of one chunk; all but the last are of one size."""
        if not 0 <= index < self.chunks:
            raise BundleError(f"{self._path} has {self.chunks} chunks, and no number {index}; ask for one that it has")
        stored_bytes = self._chunk_bytes + TAG_BYTES
        self._file.seek(HEADER_BYTES + index * stored_bytes)
        stored = self._file.read(stored_bytes)
        try:
            return self._own.decrypt(_nonce(index, index == self.chunks - 1), stored, self._told)
        except InvalidTag:
            raise _damaged(self._path) from None

    def read(self, start: int, count: int) -> bytes:
        """`count` bytes from `start`, fewer where the file ends; opens only the chunks that hold them."""
        stop = min(start + count, self.size)
        if start < 0 or start >= stop:
            return b""
        first = start // self._chunk_bytes
        held = b"".join(self.chunk(index) for index in range(first, (stop - 1) // self._chunk_bytes + 1))
        return held[start - first * self._chunk_bytes : stop - first * self._chunk_bytes]

    def __iter__(self) -> Iterator[bytes]:
        return map(self.chunk, range(self.chunks))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def sha256(path: Path, purpose: str, seal: Seal) -> str:
    """SHA-256 in hex of what was sealed in a file.

    Raises:
        BundleError: as `SealedFile`.
        OSError: likewise.
    """
    digest = hashlib.sha256()
    with SealedFile(path, purpose, seal) as file:
        for chunk in file:
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(pieces: Iterable[Piece], size: int) -> Iterator[tuple[Piece, bool]]:
    """Chunks of one size, and whether each is the last, which may be shorter or empty."""
    held = bytearray()
    for piece in pieces:
        left = memoryview(piece).cast("B")
        while len(left):
            if len(held) == size:
                yield held, False
                held = bytearray()
            if not held and len(left) > size:
                yield left[:size], False
                left = left[size:]
            else:
                room = size - len(held)
                held += left[:room]
                left = left[room:]
    yield held, True


def _nonce(index: int, last: bool) -> bytes:
    return index.to_bytes(NONCE_BYTES - 1, "big") + bytes((last,))


def _opened(path: Path) -> io.BufferedReader:
    # Neither a link, nor a named pipe, which would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{path} is not a regular file; remove it")
    return os.fdopen(descriptor, "rb")


def _unwrapped(path: Path, header: bytes, purpose: str, seal: Seal) -> tuple[AESGCM, int]:
    """A file's own cipher and the logarithm of its chunk size."""
    magic, (version, log2) = header[: len(MAGIC)], (header[len(MAGIC) : len(MAGIC) + 2].ljust(2, b"\0"))
    if magic != MAGIC:
        raise BundleError(f"{path} is no sealed file, or its beginning is damaged; restore it")
    if version != VERSION:
        raise BundleError(f"{path} is sealed in version {version}; this release reads {VERSION}: use a newer one")
    if len(header) < HEADER_BYTES or not _SMALLEST_LOG2 <= log2 <= _LARGEST_LOG2:
        raise _damaged(path)
    bound, wrapped = header[:_BOUND_BYTES], header[_BOUND_BYTES:]
    if not hmac.compare_digest(bound[len(MAGIC) + 2 : -NONCE_BYTES], seal.id):
        raise BundleError(f"{path} was sealed with the key of another run or cache; put it back where it was sealed")
    try:
        own = AESGCM(seal.key).decrypt(bound[-NONCE_BYTES:], wrapped, bound + purpose.encode())
    except InvalidTag:
        raise BundleError(
            f"{path} was changed after it was sealed, or is another file under this name; restore it"
        ) from None
    return AESGCM(own), log2


def _damaged(path: Path) -> BundleError:
    return BundleError(f"{path} was cut off, or changed after it was sealed; restore it")
