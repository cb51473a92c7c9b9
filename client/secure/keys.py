"""The cryptography of secure sums: X25519, HKDF-SHA256, ChaCha20 and ChaCha20-Poly1305, all from `cryptography`.

Flower's own mask generator folds its seed to 32 bits and feeds NumPy's Mersenne Twister, so whoever tries 2^32 seeds
takes the mask off: it is not used here. Its Shamir shares (PyCryptodome's) are.
"""

import hashlib
import os
from dataclasses import dataclass

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

NONCE = 12
"""Bytes before a sealed text, drawn afresh for each."""


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair, 32 bytes each."""

    private: bytes
    public: bytes

    @classmethod
    def new(cls) -> "KeyPair":
        """A fresh pair from the operating system's CSPRNG."""
        return cls.of(X25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def of(cls, private: bytes) -> "KeyPair":
        """The pair of a private key. Raises ValueError for one that has not 32 bytes."""
        return cls(private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())

    def agree(self, public: bytes, purpose: str) -> bytes:
        """32 bytes that the owner of `public` derives too, for this purpose alone.

        Raises ValueError for a public key that is none.
        """
        secret = X25519PrivateKey.from_private_bytes(self.private).exchange(X25519PublicKey.from_public_bytes(public))
        return derive(secret, purpose)


def derive(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes from a secret, for this purpose alone (HKDF-SHA256)."""
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=purpose.encode()).derive(secret)


def new_seed() -> bytes:
    """32 bytes from the operating system's CSPRNG."""
    return os.urandom(32)


def commitment(seed: bytes) -> bytes:
    """SHA-256 of a seed of 32 random bytes, by which a seed put together from shares is known to be the right one."""
    return hashlib.sha256(b"corolla secure seed" + seed).digest()


def keystream(key: bytes, count: int, dtype: torch.dtype) -> Tensor:
    """`count` integers, uniform over all that `dtype` has: ChaCha20 under a key that is used for nothing else."""
    data = bytearray(count * dtype.itemsize)
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    stream.update_into(bytes(len(data)), data)
    return torch.frombuffer(data, dtype=dtype) if count else torch.zeros(0, dtype=dtype)


def seal(key: bytes, text: bytes, about: str) -> bytes:
    """The text encrypted and authenticated, with what it is about."""
    nonce = os.urandom(NONCE)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, about.encode())


def unseal(key: bytes, sealed: bytes, about: str) -> bytes:
    """The text back. Raises ValueError where it was changed, or is about something else."""
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE], sealed[NONCE:], about.encode())
    except (InvalidTag, ValueError) as error:
        raise ValueError(f"{about} must arrive as they were sent, got a text that was changed on its way") from error
