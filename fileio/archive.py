"""The zip archive around a checkpoint: its digest and the checks of its entries."""

import hashlib
import io
import zipfile

DIGEST_PREFIX = b"sha256:"  # then 64 digits, as the comment that a zip archive may end with


def append_digest(archive: io.BytesIO) -> None:
    """Give a zip archive its own digest as its comment; in its place, since it may be large.

    The CRCs cover what is in the archive; this covers its directory too, which zipfile and torch
    read each in its own way.
    """
    with archive.getbuffer() as data:
        digest = hashlib.sha256(data[:-2]).hexdigest()  # without the length of a comment
    comment = DIGEST_PREFIX + digest.encode()
    archive.seek(-2, io.SEEK_END)
    archive.write(len(comment).to_bytes(2, "little") + comment)


def _verify_digest(data: bytes) -> None:
    """Raise ValueError unless an archive matches its digest; one without passes."""
    length = len(DIGEST_PREFIX) + 64
    content, comment = memoryview(data)[: -length - 2], data[-length:]
    if (
        comment.startswith(DIGEST_PREFIX)
        and comment != DIGEST_PREFIX + hashlib.sha256(content).hexdigest().encode()
    ):
        raise ValueError("its digest is another")


def is_zip(data: bytes) -> bool:
    """Tell whether bytes begin as a zip archive does."""
    return data.startswith(b"PK\x03\x04")


def verify_archive(data: bytes) -> None:
    """Raise an exception of any kind unless a zip archive is what was written."""
    _verify_digest(data)
    _verify_entries(data)


def _verify_entries(data: bytes) -> None:
    """Every entry stored, inside the file, and with the CRC it was written with."""
    end = data.rindex(b"PK\x05\x06") + 22  # of the last record, before the comment
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
