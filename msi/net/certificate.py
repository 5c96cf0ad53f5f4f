"""A certificate that everybody who holds a key can make, and nobody else: TLS by the standard library needs one.

Key and certificate follow from 32 secret bytes alone (NIST P-256, ECDSA with SHA-256 and a nonce as in RFC 6979's
spirit: derived from key and message), so that each process makes the same one and trusts no other. Nothing here runs
after a transport was made.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

P = 2**256 - 2**224 + 2**192 + 2**96 - 1
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
GENERATOR = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
Point = tuple[int, int] | None  # None is the neutral element

INTEGER, BIT_STRING, OCTET_STRING, OBJECT_ID, UTF8, UTC_TIME, TIME, SEQUENCE, SET, TAGGED_0 = (
    0x02, 0x03, 0x04, 0x06, 0x0C, 0x17, 0x18, 0x30, 0x31, 0xA0,
)  # fmt: skip
ECDSA_WITH_SHA256 = bytes.fromhex("2a8648ce3d040302")
EC_PUBLIC_KEY = bytes.fromhex("2a8648ce3d0201")
PRIME256V1 = bytes.fromhex("2a8648ce3d030107")
COMMON_NAME = bytes.fromhex("550403")


def make_certificate(secret: bytes) -> tuple[str, str]:
    """Certificate and private key, PEM."""
    private = 1 + int.from_bytes(hmac.digest(secret, b"private key", "sha512")) % (ORDER - 1)
    public = _public_bytes(private)
    algorithm = _der(SEQUENCE, _der(OBJECT_ID, ECDSA_WITH_SHA256))
    name = _der(SEQUENCE, _der(SET, _der(SEQUENCE, _der(OBJECT_ID, COMMON_NAME), _der(UTF8, b"msi"))))
    key_info = _der(
        SEQUENCE, _der(SEQUENCE, _der(OBJECT_ID, EC_PUBLIC_KEY), _der(OBJECT_ID, PRIME256V1)), _bits(public)
    )
    for_ever = _der(SEQUENCE, _der(UTC_TIME, b"200101000000Z"), _der(TIME, b"99991231235959Z"))
    content = _der(
        SEQUENCE, _der(TAGGED_0, _integer(2)), _integer(1), algorithm, name, for_ever, name, key_info
    )  # fmt: skip
    certificate = _der(SEQUENCE, content, algorithm, _bits(_sign(private, content)))
    key = _der(
        SEQUENCE, _integer(1), _der(OCTET_STRING, private.to_bytes(32)), _der(TAGGED_0, _der(OBJECT_ID, PRIME256V1))
    )
    return _pem("CERTIFICATE", certificate), _pem("EC PRIVATE KEY", key)


# -- the curve -------------------------------------------------------------------------------------------------------


def _sign(private: int, message: bytes) -> bytes:
    digest = hashlib.sha256(message).digest()
    secret = private.to_bytes(32)
    nonce = 1 + int.from_bytes(hmac.digest(secret, b"nonce" + digest, "sha512")) % (ORDER - 1)
    point = _times(nonce, GENERATOR)
    assert point is not None
    r = point[0] % ORDER
    s = pow(nonce, -1, ORDER) * (int.from_bytes(digest) + r * private) % ORDER
    return _der(SEQUENCE, _integer(r), _integer(s))


def _public_bytes(private: int) -> bytes:
    point = _times(private, GENERATOR)
    assert point is not None
    return b"\x04" + point[0].to_bytes(32) + point[1].to_bytes(32)


def _times(scalar: int, point: Point) -> Point:
    total: Point = None
    while scalar:
        if scalar & 1:
            total = _plus(total, point)
        point = _plus(point, point)
        scalar >>= 1
    return total


def _plus(one: Point, two: Point) -> Point:
    if one is None or two is None:
        return one or two
    (x1, y1), (x2, y2) = one, two
    if x1 == x2 and (y1 + y2) % P == 0:
        return None
    slope = (3 * x1 * x1 - 3) * pow(2 * y1, -1, P) if one == two else (y2 - y1) * pow(x2 - x1, -1, P)
    x3 = (slope * slope - x1 - x2) % P
    return x3, (slope * (x1 - x3) - y1) % P


# -- DER -------------------------------------------------------------------------------------------------------------


def _der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    size = (length.bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + length.to_bytes(size) + content


def _integer(value: int) -> bytes:
    return _der(INTEGER, value.to_bytes(value.bit_length() // 8 + 1))


def _bits(content: bytes) -> bytes:
    return _der(BIT_STRING, b"\x00", content)


def _pem(label: str, content: bytes) -> str:
    text = base64.b64encode(content).decode()
    lines = "\n".join(text[at : at + 64] for at in range(0, len(text), 64))
    return f"-----BEGIN {label}-----\n{lines}\n-----END {label}-----\n"
