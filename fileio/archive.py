"""Append a digest to the zip archive that torch.save writes, and verify it and the entries."""

import hashlib
import io
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


def verify_archive(data: bytes) -> None:
    """Raise an exception of some kind if an archive differs from what was written."""
    _verify_digest(data)
    _verify_entries(data)


def _verify_entries(data: bytes) -> None:
    """Check that entries are uncompressed, lie inside the file and match their CRCs."""
    end = data.rindex(b"PK\x05\x06") + 22  # of the central directory, before the comment
    if int.from_bytes(data[end - 2 : end], "little") != len(data) - end:
        raise ValueError("cut short")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            if entry.CRC == 0 and entry.file_size > 0:
                raise ValueError(f"{entry.filename} has no checksum")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("entries share a name")
        if sum(entry.file_size for entry in entries) > len(data):
            raise ValueError("entries are larger than the file")
        broken = archive.testzip()
        if broken:
            raise ValueError(f"checksum of {broken}")
