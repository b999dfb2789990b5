"""The key of a seal, kept in a small file that a passphrase or a key file opens.

Knows that file, scrypt (RFC 7914) and AES-256-GCM key wrapping; knows nothing of the files that are sealed with the
key, nor where a passphrase comes from.

The file is JSON. `wrapped` is the seal's key under AES-256-GCM with `nonce`, everything else in the file authenticated
with it. The key that wraps it is the 32 bytes of a key file, or scrypt of the passphrase (UTF-8, in Unicode's form NFC)
with the parameters that stand there. Giving a seal to another passphrase replaces this file and no other.
"""

import json
import os
import secrets
import stat
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from isthmus.durable import sync, write_whole
from isthmus.errors import BundleError, RunError
from isthmus.trust.sealing import ID_BYTES, KEY_BYTES, NONCE_BYTES, TAG_BYTES, Seal

FILE_NAME = "seal.json"
FORMAT: Literal["isthmus-seal/1"] = "isthmus-seal/1"
MAX_BYTES = 4096
SALT_BYTES = 16
SCRYPT = {"n": 1 << 17, "r": 8, "p": 1}
"""128 MiB and about half a second for each guess."""

MAX_SCRYPT_BYTES = 256 << 20
"""Of memory that a file may ask for."""


Id = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * ID_BYTES}}}$")]
Salt = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SALT_BYTES}}}$")]
Nonce = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * NONCE_BYTES}}}$")]
Wrapped = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * (KEY_BYTES + TAG_BYTES)}}}$")]


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ScryptSettings(_Block):
    """What scrypt is asked for; 128 n r bytes of memory, at most `MAX_SCRYPT_BYTES`."""

    n: Annotated[int, Field(ge=2, le=1 << 20)]
    r: Annotated[int, Field(ge=1, le=32)]
    p: Annotated[int, Field(ge=1, le=4)]
    salt: Salt

    @model_validator(mode="after")
    def _affordable(self) -> "ScryptSettings":
        too_large = 128 * self.n * self.r > MAX_SCRYPT_BYTES or self.n >= 1 << min(16 * self.r, 64)  # RFC 7914, 6
        if self.n & (self.n - 1) or too_large:
            raise ValueError("its scrypt asks for too much, or for what there is not")
        return self


class SealFile(_Block):
    """What stands in the file."""

    format: Literal["isthmus-seal/1"] = FORMAT
    id: Id
    opened_by: Literal["passphrase", "key file"]
    scrypt: ScryptSettings | None
    nonce: Nonce
    wrapped: Wrapped

    @model_validator(mode="after")
    def _opens(self) -> "SealFile":
        if (self.opened_by == "passphrase") != (self.scrypt is not None):
            raise ValueError("scrypt goes with a passphrase, and only there")
        return self

    @property
    def told(self) -> bytes:
        """What is authenticated: everything but the wrapped key."""
        return json.dumps(self.model_dump(exclude={"wrapped"}), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def load(cls, path: Path) -> "SealFile":
        """Read a file.

        Raises:
            RunError: it is missing or cannot be read.
            BundleError: it is something else.
        """
        try:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise RunError(f"{path} is gone, and with it the key: restore it, or what is sealed stays sealed") from None
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error.strerror}); check its owner and permissions") from None
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise BundleError(f"{path} is damaged ({error.errors()[0]['msg']}); restore it") from None


@dataclass(frozen=True)
class Passphrase:
    """What a person knows."""

    text: str = field(repr=False)


@dataclass(frozen=True)
class KeyFile:
    """What is in a key file."""

    path: Path
    key: bytes = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> "KeyFile":
        """Read a key file.

        Raises:
            RunError: it is missing, of another size, or its group or everybody can reach it.
        """
        try:
            with path.open("rb") as file:
                mode, content = os.fstat(file.fileno()).st_mode, file.read(KEY_BYTES + 1)
        except OSError as error:
            raise RunError(
                f"the key file {path} cannot be read ({error.strerror}); make one with `edge_client seal-key`"
            ) from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise RunError(f"others may reach the key file {path}; `chmod 600` it")
        if len(content) != KEY_BYTES:
            raise RunError(f"{path} is no key file of {KEY_BYTES} bytes; make one with `edge_client seal-key`")
        return cls(path, content)


Secret = Passphrase | KeyFile


def make_key_file(path: Path) -> None:
    """Write 32 random bytes that their owner alone can read.

    Raises:
        RunError: there is something already, or it cannot be written.
    """
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        sync(path.absolute().parent)
    except FileExistsError:
        raise RunError(f"{path} is there already, and may be a key; choose another --out") from None
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); choose another --out") from None


def keep(seal: Seal, path: Path, secret: Secret, salt: str | None = None) -> None:
    """Write a seal's file so that `secret` opens it; one that stands there is replaced, whole or not at all.

    `salt`: of another seal beside it, so that one scrypt tries a passphrase on both; None: a fresh one.

    Raises:
        OSError: the disk refuses.
    """
    scrypt = None
    if isinstance(secret, Passphrase):
        scrypt = ScryptSettings(**SCRYPT, salt=salt or secrets.token_hex(SALT_BYTES))
    nonce = secrets.token_bytes(NONCE_BYTES)
    by: Literal["passphrase", "key file"] = "key file" if scrypt is None else "passphrase"
    blank = "00" * (KEY_BYTES + TAG_BYTES)
    held = SealFile(id=seal.id.hex(), opened_by=by, scrypt=scrypt, nonce=nonce.hex(), wrapped=blank)
    wrapped = AESGCM(_key_of(secret, scrypt)).encrypt(nonce, seal.key, held.told)
    held = held.model_copy(update={"wrapped": wrapped.hex()})
    write_whole(path, (held.model_dump_json(indent=1) + "\n").encode())


def open_seal(path: Path, secret: Secret) -> Seal:
    """The seal in a file.

    Raises:
        RunError: it is missing, or something else opens it.
        BundleError: it is damaged.
    """
    held = SealFile.load(path)
    if (held.scrypt is None) != isinstance(secret, KeyFile):
        raise RunError(f"{path} is opened by a {held.opened_by}, and something else was given")
    try:
        wrapping = AESGCM(_key_of(secret, held.scrypt))
        key = wrapping.decrypt(bytes.fromhex(held.nonce), bytes.fromhex(held.wrapped), held.told)
    except InvalidTag:
        given = "this passphrase" if isinstance(secret, Passphrase) else f"the key file {secret.path}"
        raise RunError(
            f"{given} does not open {path}: give the one that it was sealed with (or the file was changed: restore it)"
        ) from None
    return Seal(bytes.fromhex(held.id), key)


def _key_of(secret: Secret, settings: ScryptSettings | None) -> bytes:
    if isinstance(secret, KeyFile):
        return secret.key
    if settings is None:
        raise RunError("a key file opens this seal, and a passphrase was given; give the key file")
    return _derived(secret.text, settings)


@lru_cache(maxsize=16)
def _derived(passphrase: str, settings: ScryptSettings) -> bytes:
    """Remembered, so that a command pays for it once however often it opens a seal."""
    text = unicodedata.normalize("NFC", passphrase).encode(errors="surrogateescape")
    salt = bytes.fromhex(settings.salt)
    try:
        return Scrypt(salt=salt, length=KEY_BYTES, n=settings.n, r=settings.r, p=settings.p).derive(text)
    except MemoryError:
        raise BundleError("there is too little memory to derive the seal's key: free some and try again") from None
