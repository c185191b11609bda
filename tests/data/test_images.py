import io
import os
import random
import re
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from pneumo.data import images
from pneumo.errors import DataError, OutOfMemory


def ramp(height=48, width=40):
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    return ((3 * y + 5 * x + noise) % 256).astype(np.uint8)


def encode(pixels, kind="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, body):
    return len(body).to_bytes(4) + name + body + zlib.crc32(name + body).to_bytes(4)


@pytest.fixture
def write(tmp_path):
    def write(content, name="case.png"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def refusal(path, reader=images.read):
    """The text of the error, which must be one line that begins with the path."""
    with pytest.raises(DataError) as caught:
        reader(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text


# Decoding


@pytest.mark.fault("P3", "L, LA, P, RGB, RGBA of one grey picture: the same pixels")
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
def test_grey_in_any_mode_is_the_same(write, mode):
    scan = images.read(write(encode(Image.fromarray(ramp()).convert(mode))))
    np.testing.assert_array_equal(scan.pixels, ramp())
    assert scan.pixels.dtype == np.uint8 and scan.pixels.flags.writeable
    assert scan.warnings == () and scan.spacing is None


@pytest.mark.fault("P3", "a bilevel picture")
def test_bilevel():
    image = Image.fromarray(ramp() > 99)
    assert image.mode == "1"
    pixels, _ = images._to_grey(image)
    np.testing.assert_array_equal(pixels, 255 * (ramp() > 99))


def test_palette_gives_colours_and_not_indices(write):
    image = Image.fromarray(ramp() % 2, mode=None).convert("P")
    image.putpalette([200, 200, 200, 10, 10, 10])
    np.testing.assert_array_equal(images.read(write(encode(image))).pixels, np.where(ramp() % 2, 10, 200))


@pytest.mark.fault("P2", "16-bit PNG using 8, 9, 10, 12, 14 and 16 bits: shifted to 8, never clipped")
@pytest.mark.parametrize(("high", "shift"), [(200, 0), (256, 2), (1023, 2), (4095, 4), (9000, 6), (65535, 8)])
def test_sixteen_bits_are_shifted_by_their_maximum(write, high, shift):
    stored = np.linspace(0, high, 48 * 40).round().astype(np.uint16).reshape(48, 40)
    np.testing.assert_array_equal(images.read(write(encode(stored))).pixels, stored >> shift)


def sixteen_bit_png(*channels, adam7=False):
    """A PNG of grey and alpha, RGB, or RGB and alpha with 16 bits a channel, which Pillow cannot write."""
    stored = np.stack(channels, axis=-1).astype(">u2")
    header = stored.shape[1].to_bytes(4) + stored.shape[0].to_bytes(4)
    header += bytes([16, {2: 4, 3: 2, 4: 6}[len(channels)], 0, 0, adam7])
    passes = [np.s_[:, :]]
    if adam7:
        passes = [np.s_[::8, ::8], np.s_[::8, 4::8], np.s_[4::8, ::4], np.s_[::4, 2::4], np.s_[2::4, ::2]]
        passes += [np.s_[::2, 1::2], np.s_[1::2, :]]
    rows = b"".join(b"\0" + row.tobytes() for part in passes for row in stored[part])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.fault("P2", "16 bits in grey with alpha, RGB, and RGB with alpha, 8 to 16 of them used: as 16-bit grey")
@pytest.mark.parametrize("high", [200, 1023, 4095, 65535])
@pytest.mark.parametrize("adam7", [False, True])
def test_sixteen_bits_in_several_channels_are_those_of_grey(write, high, adam7):
    grey = np.random.default_rng(0).integers(0, high + 1, (48, 40), dtype=np.uint16)
    opaque = np.full_like(grey, 65535)
    wanted = images.read(write(encode(grey))).pixels
    for channels in ((grey, opaque), (grey,) * 3, (grey, grey, grey, opaque)):
        scan = images.read(write(sixteen_bit_png(*channels, adam7=adam7)))
        np.testing.assert_array_equal(scan.pixels, wanted)
        assert scan.warnings == () and scan.pixels.dtype == np.uint8 and scan.pixels.flags.writeable
    content = sixteen_bit_png(grey, opaque, adam7=adam7)
    half = chunk(b"IDAT", zlib.compress(zlib.decompress(content[41:-16])[:4000]))
    assert "truncated" in refusal(write(content[:33] + half + content[-12:]))
    opaque[3, 3] -= 1  # in the lower byte
    scan = images.read(write(sixteen_bit_png(grey, opaque)))
    np.testing.assert_array_equal(scan.pixels, wanted)
    assert "transparen" in scan.warnings[0]


@pytest.mark.fault("P3", "16-bit RGB, one pixel of which differs in the lower byte: luma of 16 bits, with a warning")
def test_sixteen_bit_colours_become_luma(write):
    rgb = [ramp().astype(np.uint16) * 16 for _ in range(3)]
    rgb[1][5, 7] ^= 1
    scan = images.read(write(sixteen_bit_png(*rgb)))
    assert "channels differ" in scan.warnings[0]
    np.testing.assert_array_equal(scan.pixels, ramp())
    red = images.read(write(sixteen_bit_png(rgb[0] * 16, rgb[0], rgb[0]))).pixels
    np.testing.assert_allclose(red, (0.299 * 16 + 0.701) * ramp() / 16, atol=1)  # its luma has 15 bits: shifted by 8


@pytest.mark.fault("P3", "one pixel whose channels differ: luma, with a warning")
def test_colours_become_luma_with_a_warning(write):
    rgb = np.stack([ramp(), ramp(), ramp()], axis=-1)
    rgb[5, 7, 0] ^= 1  # one pixel is enough
    scan = images.read(write(encode(rgb)))
    assert "channels differ" in scan.warnings[0]
    np.testing.assert_array_equal(scan.pixels, np.array(Image.fromarray(rgb).convert("L")))
    rgb = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    np.testing.assert_array_equal(images.read(write(encode(rgb))).pixels, np.array(Image.fromarray(rgb).convert("L")))


def test_transparency_is_dropped_with_a_warning(write):
    alpha = np.full_like(ramp(), 255)
    alpha[0, 0] = 0
    scan = images.read(write(encode(np.stack([ramp(), alpha], axis=-1))))
    assert "transparen" in scan.warnings[0]
    np.testing.assert_array_equal(scan.pixels, ramp())


@pytest.mark.fault("P4", "a JPEG named .png: the same pixels as .jpg, with a warning")
def test_content_decides_and_a_wrong_suffix_warns(write):
    content = encode(ramp(), "JPEG", quality=90)
    right, wrong = images.read(write(content, "a.JPG")), images.read(write(content, "a.png"))
    np.testing.assert_array_equal(right.pixels, wrong.pixels)
    assert right.warnings == ()
    assert wrong.warnings == ("named .png, but its content is JPEG",)


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x013B] = "ROENTGEN"  # artist
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.fault(
    "P4", "EXIF orientations 1 to 8 of PNG and JPEG, big and little endian: as Pillow turns, with a warning"
)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_turned_as_its_exif_says(write, kind, orientation):
    content = encode(ramp(), kind, exif=exif_of(orientation))
    turned = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    scan = images.read(write(content))
    np.testing.assert_array_equal(scan.pixels, turned)
    assert scan.pixels.flags.writeable and scan.pixels.flags.c_contiguous
    assert images.size(write(content)) == turned.shape
    said = [] if orientation == 1 else [f"turned or mirrored as its EXIF orientation {orientation} asks, as viewers do"]
    assert [remark for remark in scan.warnings if "named" not in remark] == said
    motorola = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + bytes(6)
    np.testing.assert_array_equal(images.read(write(encode(ramp(), kind, exif=motorola))).pixels, turned)


@pytest.mark.fault("P4", "masks of EXIF orientations 1 to 8 are turned alike, and PNGs of several channels of 16 bits")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_its_image(write, orientation):
    mask = np.where(ramp() > 99, 255, 0).astype(np.uint8)
    content = encode(mask, exif=exif_of(orientation))
    turned = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))) > 0
    np.testing.assert_array_equal(images.read_mask(write(content)), turned)
    content = sixteen_bit_png(*[mask // 255] * 3)
    block = chunk(b"eXIf", exif_of(orientation).removeprefix(b"Exif\0\0"))
    texts = chunk(b"tEXt", b"Comment\0" + bytes(2000))  # `size` must look beyond the first bytes
    path = write(content[:33] + texts + block + content[33:])
    np.testing.assert_array_equal(images.read_mask(path), turned)
    assert images.size(path) == turned.shape


@pytest.mark.fault("P4", "an EXIF block cut at every byte, of random bytes, and of odd values: read, upright")
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it looks there for the resolution
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_damaged_exif_block_does_no_harm(write, kind):
    upright = images.read(write(encode(ramp(), kind))).pixels
    whole, rng = exif_of(6), random.Random(0)
    turned = images.read(write(encode(ramp(), kind, exif=whole))).pixels
    assert not np.array_equal(turned, upright)
    for end in range(6, len(whole)):
        pixels = images.read(write(encode(ramp(), kind, exif=whole[:end]))).pixels
        np.testing.assert_array_equal(pixels, turned if end >= 26 else upright)  # there the orientation has ended
    for _ in range(100):
        spoiled = bytearray(whole)
        for _ in range(3):
            spoiled[rng.randrange(6, len(whole))] = rng.randrange(256)
        pixels = images.read(write(encode(ramp(), kind, exif=bytes(spoiled)))).pixels
        assert sorted(pixels.shape) == sorted(upright.shape)
    tail = b"\0\x01\x01\x12\0\x03\0\0\0\x01"
    for odd in (b"\0\0", b"\0\x09", b"\xff\xff"):  # no orientations
        block = b"Exif\0\0MM\0*\0\0\0\x08" + tail + odd + bytes(6)
        scan = images.read(write(encode(ramp(), kind, exif=block)))
        np.testing.assert_array_equal(scan.pixels, upright)
        assert not any("EXIF" in remark for remark in scan.warnings)
    far = b"Exif\0\0MM\0*\xff\xff\xff\xff"  # the table lies beyond the block
    np.testing.assert_array_equal(images.read(write(encode(ramp(), kind, exif=far))).pixels, upright)


@pytest.mark.fault("P6", "a constant image: a warning")
def test_constant_image_warns(write):
    assert "constant" in images.read(write(encode(np.full((40, 40), 7, np.uint8)))).warnings[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_size_from_the_header(write, kind):
    assert images.size(write(encode(ramp(48, 40), kind))) == (48, 40)


# Refusals


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "HTML"),
        (b"\n <html>Sign in</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"GIF89a" + bytes(200), "a GIF file, not a PNG, JPEG or DICOM"),
        (b"MM\0*" + bytes(200), "a TIFF file, not a PNG, JPEG or DICOM. Save it as PNG, 16 bits as 16 bits."),
        (b"GRIFFIN" + bytes(200), ": not a PNG, JPEG or DICOM file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50) + b"IEND", "Copy it again"),
        (encode(ramp())[:100], "truncated"),
        (encode(Image.new("CMYK", (40, 40)), "JPEG"), "mode CMYK"),
        (encode(ramp(31, 40)), "40 x 31 pixels; at least 32"),
        (encode(np.zeros((16_400, 33), np.uint8)), "33 x 16,400 pixels; 64 Mpx and 16,384"),
    ],
)
def test_what_is_no_radiograph_is_named(write, content, reason):
    path = write(content)
    assert reason in refusal(path)


@pytest.mark.fault("P5", "headers of 81 Mpx to 4,294 Mpx, PNG and JPEG: refused before a pixel is unpacked")
def test_a_bomb_is_refused_before_it_is_unpacked(write, figure):
    jpeg = encode(ramp(), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5  # height and width, of two bytes each
    tracemalloc.start()
    count = 0
    for side in (9_000, 12_000, 16_000, 60_000, 65_500):  # beyond our limit, Pillow's warning, Pillow's error
        header = side.to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        for content in (b"\x89PNG\r\n\x1a\n" + body, jpeg[:at] + side.to_bytes(2) * 2 + jpeg[at + 4 :]):
            for reader in (images.read, images.size):
                text = refusal(write(content), reader)
                assert f"{side:,} x {side:,} pixels; 64 Mpx" in text or "more pixels than the limit of 64 Mpx" in text
                count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    figure(f"{count} of {count} refused, at most {peak / 1024:.0f} KiB of memory taken")


@pytest.mark.fault("P1", "PNG and JPEG cut at every 1 %")
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_every_truncation_is_refused(write, figure, kind):
    content = encode(ramp(), kind)
    for percent in range(100):
        text = refusal(write(content[: len(content) * percent // 100]))
        if kind == "PNG" and percent > 2:  # from where on it is known to be one
            assert "truncated" in text
    figure(f"{kind}: 100 of 100 refused")


@pytest.mark.fault("P1", "every single bit of a PNG flipped")
def test_every_flipped_bit_in_a_png_is_found(write, figure):
    content = encode(np.add.outer(np.arange(32), np.arange(33)).astype(np.uint8))
    found = 0
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        refusal(write(damaged))
        found += 1
    figure(f"{found:,} of {8 * len(content):,} found")


def test_cut_off_png_says_how_much_is_there(write):
    content = encode(ramp())
    size = len(content)
    text = refusal(write(content[:-20]))
    assert f"image file is truncated ({size - 20:,} of at least {size - 12:,} bytes are there). Copy it again." in text


def test_texts_and_names_in_a_png_are_passed_over(write):
    content = encode(ramp())
    texts = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(60_000_000))) + chunk(b"tEXt", b"Author\0ROENTGEN")
    assert len(texts) < 100_000
    scan = images.read(write(content[:33] + texts + content[33:]))
    np.testing.assert_array_equal(scan.pixels, ramp())


def test_a_jpeg_of_countless_scans_is_refused_at_once(write):
    content = encode(ramp(), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    path = write(content[:last] + content[last:-2] * 200 + b"\xff\xd9", "case.jpg")
    assert re.search(r"a JPEG of \d+ scans, made to keep a decoder busy; 100 are the limit", refusal(path))


def test_not_a_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.png")
    assert "not a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a file" in refusal(tmp_path / "pipe.png")
    refusal(tmp_path / "nul\0.png")


def test_large_file_is_not_read_whole(write, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    assert "larger than" in refusal(write(encode(ramp())))


def test_no_memory_is_no_fault_of_the_file(write, monkeypatch):
    def fail(data, kind):
        raise MemoryError

    monkeypatch.setattr(images, "_decode", fail)
    with pytest.raises(OutOfMemory, match=r"case\.png"):
        images.read(write(encode(ramp())))


@pytest.mark.fault("P1", "random bytes changed, put in or taken out")
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damage_never_raises_anything_else(write, kind):
    rng = random.Random(0)
    contents = [
        encode(ramp(), kind),
        encode(np.stack([ramp()] * 3, axis=-1), kind),
        encode(ramp().astype(np.uint16) * 99) if kind == "PNG" else encode(ramp(), kind, progressive=True),
    ]
    refused = 0
    for _ in range(150):
        content = bytearray(rng.choice(contents))
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(content))
            content[at : at + rng.randrange(2)] = rng.randbytes(rng.randrange(3))
        path = write(content)
        try:
            images.read(path)
            images.read_mask(path)
        except DataError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            refused += 1
    assert refused > 50


# Names


def test_is_image(tmp_path, write):
    for name in ("a.png", "b.JPG", "c.jpeg", "d.DCM", "e.dicom"):
        assert images.is_image(tmp_path / name)
    assert images.is_image(write(bytes(128) + b"DICM", "1.2.840.3"))
    assert not images.is_image(write(encode(ramp()), "png"))
    assert not images.is_image(tmp_path)
    assert not images.is_image(tmp_path / "none.txt")


# Masks


@pytest.mark.parametrize("high", [1, 255])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_mask_of_two_values(write, high, mode):
    mask = ramp() > 99
    image = Image.fromarray((mask * high).astype(np.uint8)).convert(mode)
    read = images.read_mask(write(encode(image)))
    assert read.dtype == np.bool_
    np.testing.assert_array_equal(read, mask)


@pytest.mark.fault("I11", "a 16-bit RGB mask of 0 and 1, of 0 and 255, of 0 and 65,535, and with colours")
def test_sixteen_bit_mask_of_several_channels(write):
    mask = ramp() > 99
    for high in (1, 255):
        np.testing.assert_array_equal(images.read_mask(write(sixteen_bit_png(*[mask * high] * 3))), mask)
    assert "found 2 values: 0, 65535" in refusal(write(sixteen_bit_png(*[mask * 65535] * 3)), images.read_mask)
    assert "colours" in refusal(write(sixteen_bit_png(mask, mask, mask & False)), images.read_mask)


@pytest.mark.parametrize(("value", "count"), [(0, 0), (1, 1600), (255, 1600)])
def test_mask_of_one_value(write, value, count):
    assert images.read_mask(write(encode(np.full((40, 40), value, np.uint8)))).sum() == count


@pytest.mark.fault("I11", "masks whose transparency holds them, black strokes or a white layer: refused")
def test_a_mask_with_transparency_is_refused(write, figure):
    strokes = np.zeros((40, 40), np.uint8)
    strokes[9:20, 5:30] = 255
    black, white = np.zeros_like(strokes), np.full_like(strokes, 255)
    palette = Image.fromarray(strokes // 255).convert("P")
    layers = [
        encode(Image.merge("RGBA", [Image.fromarray(part) for part in (grey, grey, grey, strokes)]))
        for grey in (black, white)
    ]
    layers.append(encode(Image.merge("LA", [Image.fromarray(black), Image.fromarray(strokes)])))
    content = io.BytesIO()
    palette.save(content, "PNG", transparency=0)
    layers.append(content.getvalue())
    for content in layers:
        assert "a mask must be opaque" in refusal(write(content), images.read_mask)
    opaque = Image.merge("LA", [Image.fromarray(strokes), Image.fromarray(white)])
    np.testing.assert_array_equal(images.read_mask(write(encode(opaque))), strokes > 0)
    figure(f"{len(layers)} of {len(layers)} refused")


def test_a_nearly_black_picture_is_warned_of(write):
    """A mark of 16 bits on an X-ray of 12 leaves 16 grey levels of it."""
    stored = ramp(4095).astype(np.uint16)
    assert images.read(write(encode(Image.fromarray(stored)))).warnings == ()
    stored[:2, :5] = 65535
    (said,) = images.read(write(encode(Image.fromarray(stored)))).warnings
    assert said.startswith("nearly black: 99 of 100 pixels are below 32 of 255. A mark far brighter than the X-ray")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (120, 135, "of little contrast: 98 of 100 pixels are from 120 to 135 of 255. A mark far brighter than the"),
        (0, 63, "of little contrast: 98 of 100 pixels are from 1 to 62 of 255."),
        (0, 70, None),
        (0, 400, "36% of its pixels are white. Its window or lookup table may be that of other values"),
        (0, 330, None),
    ],
)
def test_a_picture_of_few_levels_or_much_white_is_warned_of(write, low, high, said):
    """As of a window that is another image's; a ramp from `low` to `high`."""
    values = np.clip(np.linspace(low, high, 128 * 128).round(), 0, 255).astype(np.uint8).reshape(128, 128)
    found = images.read(write(encode(Image.fromarray(values)))).warnings
    assert [remark.startswith(said) for remark in found] == [True] if said else found == ()


@pytest.mark.parametrize("levels", [2, 16, 17])
def test_a_mask_among_x_rays_is_warned_of(write, levels):
    values = np.linspace(0, 254, levels).astype(np.uint8)[np.arange(64 * 64) % levels].reshape(64, 64)
    found = images.read(write(encode(Image.fromarray(values)))).warnings
    said = [f"of {levels} grey levels alone: a mask or a drawing, and not an X-ray?"]
    assert list(found) == (said if levels <= 16 else [])


@pytest.mark.fault("P1", "X-rays of the challenge, where they are")
def test_real_images_are_not_warned_of(siim, figure):
    paths = sorted(path for name in ("train", "test") for path in (siim / "gold-1024" / name).iterdir())
    assert len(paths) > 20 and [path.name for path in paths if images.read(path).warnings] == []
    figure(f"{len(paths)} without a warning")


def test_a_jpeg_that_was_cut_off_and_closed_is_warned_of(write):
    y, x = np.mgrid[:128, :128]
    content = io.BytesIO()
    Image.fromarray(((np.sin(x / 9) + np.cos(y / 13) + 2) * 60).astype(np.uint8)).save(content, "JPEG", quality=95)
    whole = content.getvalue()
    assert images.read(write(whole, "a.jpg")).warnings == ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scan = images.read(write(whole[: len(whole) // 3] + b"\xff\xd9", "a.jpg"))
    grey = int((scan.pixels == scan.pixels[-1, 0]).all(axis=1).sum())
    assert grey > 60 and scan.warnings[0].startswith(f"its lowest {grey} rows are all of grey ")
    black = np.vstack([scan.pixels[:30], np.zeros((98, 128), np.uint8)])  # the collimator's edge
    content = io.BytesIO()
    Image.fromarray(black).save(content, "JPEG", quality=95)
    assert images.read(write(content.getvalue(), "a.jpg")).warnings == ()


def test_bilevel_mask(write):
    np.testing.assert_array_equal(images.read_mask(write(encode(Image.fromarray(ramp() > 99)))), ramp() > 99)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (
            np.where(ramp() > 99, 255, 0).astype(np.uint8) // 2,
            "found 2 values: 0, 127. Set the label of the pneumothorax to 255, and all others to 0.",
        ),
        (ramp(), "found 256 values: 0, 1, 2, 3, 4, 5, 6, 7, .... Save it as PNG, resized without smoothing."),
        (np.where(ramp() > 99, 255, 0).astype(np.uint16) * 257, "found 2 values: 0, 65535"),
        (np.stack([ramp(), 0 * ramp(), ramp()], axis=-1), "colours"),
    ],
)
def test_mask_of_other_values_is_refused_with_them(write, pixels, reason):
    assert reason in refusal(write(encode(pixels)), images.read_mask)


# Squares


@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4), (3, 8), (1, 6)])
def test_square_and_back(shape):
    pixels = np.arange(1, 1 + shape[0] * shape[1], dtype=np.uint16).reshape(shape)
    square = images.to_square(pixels)
    assert square.shape == (max(shape), max(shape)) and square.dtype == pixels.dtype
    assert square.sum() == pixels.sum()  # padded with zeros
    np.testing.assert_array_equal(images.from_square(square, *shape), pixels)


def test_padding_is_equal_on_both_sides():
    square = images.to_square(np.ones((2, 5), dtype=bool))
    np.testing.assert_array_equal(square.any(axis=1), [False, True, True, False, False])


@pytest.mark.parametrize("side", [1, 7, 64, 100])
def test_boxes_are_where_an_image_lies_on_a_grid(side):
    shapes = [*np.random.default_rng(side).integers(1, 130, (60, 2)).tolist(), [1, 100], [100, 1], [50, 50], [40, 64]]
    for shape, (top, bottom, left, right) in zip(shapes, images.boxes(np.array(shapes), side).tolist(), strict=True):
        square = images.to_square(np.ones(shape, dtype=np.bool_))
        centres = (2 * np.arange(side) + 1) * len(square) // (2 * side)
        found = np.zeros((side, side), dtype=np.bool_)
        found[top:bottom, left:right] = True
        np.testing.assert_array_equal(found, square[np.ix_(centres, centres)])


def test_wrong_square_is_refused():
    with pytest.raises(ValueError, match=r"\(5, 5\)"):
        images.from_square(np.zeros((6, 6)), 5, 4)


def test_resize_smooths_and_keeps_the_identity():
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[::2] = 200
    assert images.resize(pixels, 64) is pixels
    small = images.resize(pixels, 16)
    assert small.shape == (16, 16) and small.dtype == np.uint8
    assert np.abs(small.astype(int) - 100).max() < 20  # picking pixels would give 0 or 200
    assert images.resize(pixels, 96).shape == (96, 96)


# Real files


def test_real_masks_and_images(siim):
    folder = siim / "gold-1024"
    for path in sorted((folder / "mask").iterdir())[:3]:
        assert images.read_mask(path).shape == images.size(folder / "train" / path.name) == (1024, 1024)
        scan = images.read(folder / "train" / path.name)
        np.testing.assert_array_equal(scan.pixels, np.array(Image.open(folder / "train" / path.name)))
        assert scan.warnings == ()
