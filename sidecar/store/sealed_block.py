"""A block as it lies in a file or a remote store: a header that says what it is, then the bytes. Pure.

The checksum is CRC-32 over the header's other fields and the bytes, as in ZIP: it finds what is torn, cut, zeroed or
mixed up, at 3 GB/s a core where SHA-1 gave 1.3 and BLAKE2b 0.6 (measured). It is no signature: whoever may write into
the store is trusted.
"""

from __future__ import annotations

import struct
import zlib

from sidecar.store.keys import STORE_FORMAT, BlockKey

Bytes = bytes | bytearray | memoryview

MAGIC = b"BATONKV\n"
MAX_HASH_BYTES = 64
_FIELDS = struct.Struct(f"<8sHH16s{MAX_HASH_BYTES}sQ")
"""Magic, format, bytes of the hash, namespace, hash padded with zeros, bytes of the block."""
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size


def header_of(key: BlockKey, block: Bytes) -> bytes:
    """What goes before `block`."""
    fields = _FIELDS.pack(MAGIC, STORE_FORMAT, len(key.block_hash), key.namespace, key.block_hash, len(block))
    return fields + _CHECKSUM.pack(zlib.crc32(block, zlib.crc32(fields)))


def fault(header: Bytes, block: Bytes, key: BlockKey) -> str:
    """Why these are not the bytes of `key`: torn, foreign, mismatch or corrupt; "" if they are."""
    if len(header) < HEADER_BYTES:
        return "torn"
    magic, store_format, hash_bytes, namespace, padded_hash, num_bytes = _FIELDS.unpack_from(header)
    if magic != MAGIC or store_format != STORE_FORMAT:
        return "foreign"
    if namespace != key.namespace or padded_hash[:hash_bytes] != key.block_hash:
        return "mismatch"
    if num_bytes != len(block):
        return "torn"
    (checksum,) = _CHECKSUM.unpack_from(header, _FIELDS.size)
    return "" if checksum == zlib.crc32(block, zlib.crc32(bytes(header[: _FIELDS.size]))) else "corrupt"
