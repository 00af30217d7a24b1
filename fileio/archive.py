"""Append a digest to the zip archive that torch.save writes, and verify it and the entries."""

import hashlib
import io
import struct
import zipfile

DIGEST_PREFIX = b"sha256:"  # with 64 hex digits, stored as the zip archive's comment


def append_digest(archive: io.BytesIO) -> None:
    """Write a zip archive's digest into its comment, in place, since the archive may be large.

    CRCs cover the entries only. The digest covers the central directory too, which zipfile and
    torch parse differently.
    """
    with archive.getbuffer() as data:
        digest = hashlib.sha256(data[:-2]).hexdigest()  # without the comment's length
    comment = DIGEST_PREFIX + digest.encode()
    archive.seek(-2, io.SEEK_END)
    archive.write(len(comment).to_bytes(2, "little") + comment)


def _verify_digest(data: bytes) -> None:
    """Raise ValueError if the archive has a digest and does not match it."""
    length = len(DIGEST_PREFIX) + 64
    content, comment = memoryview(data)[: -length - 2], data[-length:]
    has_digest = comment.startswith(DIGEST_PREFIX)
    if has_digest and comment[len(DIGEST_PREFIX) :].decode() != hashlib.sha256(content).hexdigest():
        raise ValueError("its digest is another")


def is_zip(data: bytes) -> bool:
    """Tell whether bytes begin as a zip archive does."""
    return data.startswith(b"PK\x03\x04")


def verify_archive(data: bytes, need_checksums: bool = True) -> None:
    """Raise an exception of some kind if an archive differs from what was written.

    Args:
        need_checksums: refuse what torch.save wrote after set_crc32_options(False), whose CRCs are
            all 0.
    """
    _verify_digest(data)
    _verify_entries(data, need_checksums)


def entries(data: bytes) -> dict[str, memoryview]:
    """Return the contents of an archive's entries by name, after `verify_archive`."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            header = entry.header_offset
            name, extra = struct.unpack("<HH", data[header + 26 : header + 30])
            start = header + 30 + name + extra
            found[entry.filename] = memoryview(data)[start : start + entry.file_size]
    return found


def _verify_entries(data: bytes, need_checksums: bool) -> None:
    """Check that entries are uncompressed, lie inside the file and match their CRCs."""
    end = data.rindex(b"PK\x05\x06") + 22  # of the central directory, before the comment
    if int.from_bytes(data[end - 2 : end], "little") != len(data) - end:
        raise ValueError("cut short")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = archive.infolist()
        has_checksums = need_checksums or any(entry.CRC for entry in found)
        for entry in found:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            if has_checksums and entry.CRC == 0 and entry.file_size > 0:
                raise ValueError(f"{entry.filename} has no checksum")
        if len({entry.filename for entry in found}) < len(found):
            raise ValueError("entries share a name")
        if sum(entry.file_size for entry in found) > len(data):
            raise ValueError("entries are larger than the file")
        broken = archive.testzip() if has_checksums else None
        if broken:
            raise ValueError(f"checksum of {broken}")
