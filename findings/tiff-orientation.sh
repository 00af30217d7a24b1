#!/usr/bin/env bash
# Pillow turns a TIFF by its orientation tag as it opens it, and no other format.
#
# Pillow 13.0.0. One picture of 8 x 4 pixels, saved five times with the same Exif tag (Orientation 6:
# "turn by 90 degrees to display"). Opened with Image.open alone, without ImageOps.exif_transpose:
#
#   PNG    size (8, 4)  pixels as stored: True   tag after load: 6
#   JPEG   size (8, 4)  pixels as stored: True   tag after load: 6
#   WEBP   size (8, 4)  pixels as stored: True   tag after load: 6
#   TIFF   size (4, 8)  pixels as stored: False  tag after load: None
#
# So in a folder of mixed formats some pictures are upright and others lie on their side, although
# no code asks for a rotation; and whoever counts the tag after loading finds none in the TIFFs.
# A trainer that "ignores the orientation" must turn TIFFs back, or say that it does not ignore theirs.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0
"$work/venv/bin/python" - <<'P'
import io

from PIL import Image

TAG = 0x112
picture = Image.new("RGB", (8, 4))
picture.paste((200, 200, 200), (0, 0, 4, 4))  # the left half is light
exif = Image.Exif()
exif[TAG] = 6
found = {}
for name in ("PNG", "JPEG", "WEBP", "TIFF"):
    file = io.BytesIO()
    picture.save(file, name, exif=exif, **({"lossless": True} if name == "WEBP" else {}))
    opened = Image.open(file)
    size = opened.size
    opened.load()
    light = opened.getpixel((0, opened.height - 1))[0] > 100  # bottom left: light as stored
    found[name] = size, light, opened.getexif().get(TAG)
    tag = found[name][2]
    print(f"{name:5}  size {size}  pixels as stored: {light!s:5}  tag after load: {tag}")
stored, turned = ((8, 4), True, 6), ((4, 8), False, None)
assert found == {"PNG": stored, "JPEG": stored, "WEBP": stored, "TIFF": turned}
P
