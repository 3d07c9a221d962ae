"""Files are written all or nothing, and images are read right or refused."""

from __future__ import annotations

import errno
import io as stdlib_io
import os
import stat
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from napari_unetpp import io
from napari_unetpp.errors import ImageFileError, SaveError
from napari_unetpp.io import files

if TYPE_CHECKING:
    from collections.abc import Callable

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX file rights and links")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "labels.tif"
    path.write_bytes(b"old")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- atomic_write ----------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"new", b"x" * 3_000_000])
def test_bytes_and_writers_arrive(content: bytes, tmp_path: Path) -> None:
    io.atomic_write(tmp_path / "a", content)
    io.atomic_write(str(tmp_path / "b"), lambda file: file.write(content))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == content
    assert names(tmp_path) == ["a", "b"]


def test_an_existing_file_is_replaced_only_if_asked(old: Path) -> None:
    with pytest.raises(SaveError, match=r"`labels.tif` exists\. .*overwrite=True"):
        io.atomic_write(old, b"new")
    assert old.read_bytes() == b"old"
    io.atomic_write(old, b"new", overwrite=True)
    assert old.read_bytes() == b"new"
    assert names(old.parent) == ["labels.tif"]


@POSIX
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_rights_that_the_umask_leaves(
    mask: int, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        io.atomic_write(tmp_path / "a", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o666])
def test_a_replaced_file_keeps_its_rights(mode: int, old: Path) -> None:
    old.chmod(mode)
    io.atomic_write(old, b"new", overwrite=True)
    assert stat.S_IMODE(old.stat().st_mode) == mode


@POSIX
def test_a_link_stays_a_link(old: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = elsewhere / "link.tif"
    link.symlink_to(old)
    with pytest.raises(SaveError, match="exists"):
        io.atomic_write(link, b"new")
    io.atomic_write(link, b"new", overwrite=True)
    assert link.is_symlink()
    assert old.read_bytes() == b"new"
    assert names(elsewhere) == ["link.tif"]
    dangling = elsewhere / "dangling"
    dangling.symlink_to(tmp_path / "later")
    io.atomic_write(dangling, b"new")
    assert (tmp_path / "later").read_bytes() == b"new"


@POSIX
def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null", loop, "a\0b", "x" * 300):
        with pytest.raises(SaveError):
            io.atomic_write(path, b"new", overwrite=True)
    with pytest.raises(SaveError, match="no folder `none`"):
        io.atomic_write(tmp_path / "none" / "a", b"new")
    assert names(tmp_path) == ["loop", "pipe"]


def test_a_protected_file_is_not_replaced(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SaveError, match="write-protected"):
        io.atomic_write(old, b"new", overwrite=True)
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["a" * 255, "ü" * 127, "a\nb", "👩 1.tif", ".hidden"])
def test_odd_names_work(name: str, tmp_path: Path) -> None:
    try:
        (tmp_path / name).touch()
    except OSError:
        pytest.skip("this file system has no such names")
    io.atomic_write(tmp_path / name, b"new", overwrite=True)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"new"


class FullDisk:
    """A file whose `write`, `flush` or `fileno` finds the disk full."""

    def __init__(self, file: BinaryIO, call: str) -> None:
        self.file, self.call = file, call

    def __getattr__(self, name: str) -> Any:
        if name == self.call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *problem: object) -> None:
        self.file.close()


def fails(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "call", ["replace", "fsync", "chmod", "open", "write", "flush", "fileno"]
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_keeps_the_old_file(
    call: str, exists: bool, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exists:
        old.unlink()
        if call == "chmod":
            pytest.skip("a new file's rights are not changed")
    before = names(old.parent)
    with monkeypatch.context() as patch:
        if hasattr(os, call) and call != "write":
            patch.setattr(os, call, fails)
        else:
            patch.setattr(
                files,
                "open",
                lambda *args: FullDisk(open(*args), call),  # type: ignore[call-overload]
                raising=False,
            )
        with pytest.raises(SaveError, match=r"`labels.tif` was not saved: No space"):
            io.atomic_write(old, b"new", overwrite=True)
    assert names(old.parent) == before
    if exists:
        assert old.read_bytes() == b"old"
    io.atomic_write(old, b"new", overwrite=True)
    assert old.read_bytes() == b"new"


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ValueError, MemoryError])
def test_a_writer_that_fails_half_way_leaves_nothing(
    problem: type[BaseException], old: Path
) -> None:
    def half(file: BinaryIO) -> None:
        file.write(b"ne")
        raise problem

    with pytest.raises(problem):
        io.atomic_write(old, half, overwrite=True)
    assert old.read_bytes() == b"old"
    assert names(old.parent) == ["labels.tif"]


def test_too_little_room_is_told_before_writing(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 2 * 1000 - 1})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(SaveError, match="Make room or choose another folder"):
        io.atomic_write(old, b"x" * 1000, overwrite=True)
    monkeypatch.undo()
    usage.free = 2000
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    io.atomic_write(old, b"x" * 1000, overwrite=True)
    assert old.stat().st_size == 1000


@pytest.mark.parametrize(("failures", "saved"), [(5, True), (6, False)])
def test_a_file_that_is_held_for_a_moment_is_tried_again(
    failures: int, saved: bool, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, waits, left = os.replace, list[float](), [failures]

    def held(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(errno.EACCES, "held by a virus scanner")
        replace(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(files, "_RETRY_DELAYS", (0.08, 0.16, 0.32, 0.64, 1.28))
    monkeypatch.setattr(files.time, "sleep", waits.append)
    if saved:
        io.atomic_write(old, b"new", overwrite=True)
    else:
        with pytest.raises(SaveError, match="virus scanner"):
            io.atomic_write(old, b"new", overwrite=True)
    assert old.read_bytes() == (b"new" if saved else b"old")
    assert sum(waits) < 2.5
    assert names(old.parent) == ["labels.tif"]


@POSIX
def test_a_folder_that_cannot_be_synchronised_is_a_warning_only(
    old: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsync = os.fsync

    def picky(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not here")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", picky)
    io.atomic_write(old, b"new", overwrite=True)
    assert old.read_bytes() == b"new"
    assert "could not be synchronised" in caplog.text


@POSIX
def test_data_reach_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def call(*args: Any, name: str = name, original: Any = original) -> None:
            size = os.fstat(args[0]).st_size if name == "fsync" else 0
            folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            calls.append("folder" if folder else f"{name} {size}")
            original(*args)

        monkeypatch.setattr(os, name, call)
    io.atomic_write(tmp_path / "a", b"12345")
    assert calls == ["fsync 5", "replace 0", "folder"]


def test_write_text_is_utf8_with_plain_line_ends(tmp_path: Path) -> None:
    io.write_text(tmp_path / "a.csv", "größe\n")
    assert (tmp_path / "a.csv").read_bytes() == b"gr\xc3\xb6\xc3\x9fe\n"
    with pytest.raises(SaveError, match="exists"):
        io.write_text(tmp_path / "a.csv", "")


# --- images: what is read --------------------------------------------------------


def image(shape: tuple[int, ...], dtype: str = "u1") -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 250, shape)
    return values.astype(dtype)


def tiff_bytes(array: np.ndarray, **options: Any) -> bytes:
    buffer = stdlib_io.BytesIO()
    tifffile.imwrite(buffer, array, **{"photometric": "minisblack", **options})
    return buffer.getvalue()


def pillow_bytes(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = stdlib_io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = stdlib_io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "f4", "f8", ">u2"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"bigtiff": True}])
def test_tiff_types(dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    array = image((7, 9), dtype)
    order = ">" if dtype.startswith(">") else "<"
    (tmp_path / "a.tif").write_bytes(tiff_bytes(array, byteorder=order, **options))
    probe, found = io.probe(tmp_path / "a.tif"), io.read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(found, array)
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    assert (probe.shape, probe.dtype) == (found.shape, found.dtype)
    assert (probe.axes, probe.kind) == ("YX", "tiff")
    assert found.flags.writeable


@pytest.mark.parametrize(
    ("shape", "axes", "options"),
    [
        ((3, 7, 9), "ZYX", {"metadata": {"axes": "ZYX"}}),
        ((3, 7, 9), "QYX", {"metadata": None}),
        ((3, 7, 9), "ZYX", {"compression": "zlib", "metadata": {"axes": "ZYX"}}),
        ((3, 2, 7, 9), "ZCYX", {"imagej": True, "metadata": {"axes": "ZCYX"}}),
        ((7, 9, 3), "YXS", {"photometric": "rgb"}),
        ((3, 7, 9), "SYX", {"photometric": "rgb", "planarconfig": "separate"}),
        ((40, 50), "YX", {"tile": (16, 16), "compression": "zlib"}),
        ((40, 50), "YX", {"rowsperstrip": 7}),
        ((2, 7, 9, 3), "QYXS", {"photometric": "rgb", "metadata": None}),
        ((1, 1), "YX", {}),
    ],
)
def test_tiff_layouts(
    shape: tuple[int, ...], axes: str, options: dict[str, Any], tmp_path: Path
) -> None:
    array = image(shape)
    (tmp_path / "a.tif").write_bytes(tiff_bytes(array, **options))
    assert io.probe(tmp_path / "a.tif").shape == shape
    assert io.probe(tmp_path / "a.tif").axes.replace("I", "Q") == axes
    np.testing.assert_array_equal(io.read_image(tmp_path / "a.tif"), array)


@pytest.mark.parametrize("shape", [(40, 50), (7, 9, 3)])
@pytest.mark.parametrize("pages", [1, 3])
def test_lzw_needs_no_further_package(
    shape: tuple[int, ...], pages: int, tmp_path: Path
) -> None:
    arrays = [image(shape) + i for i in range(pages)]
    first, *others = [Image.fromarray(a) for a in arrays]
    content = pillow_bytes(
        first, "TIFF", compression="tiff_lzw", save_all=True, append_images=others
    )
    (tmp_path / "a.tif").write_bytes(content)
    expected = np.stack(arrays) if pages > 1 else arrays[0]
    assert io.probe(tmp_path / "a.tif").shape == expected.shape
    np.testing.assert_array_equal(io.read_image(tmp_path / "a.tif"), expected)


PALETTE = Image.fromarray(image((7, 9)) % 3)
PALETTE.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
GREY_PALETTE = PALETTE.copy()
GREY_PALETTE.putpalette([0, 0, 0, 90, 90, 90, 180, 180, 180])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.png", pillow_bytes(Image.fromarray(image((7, 9))), "PNG"), image((7, 9))),
        ("a.bmp", pillow_bytes(Image.fromarray(image((7, 9))), "BMP"), image((7, 9))),
        (
            "a.png",
            pillow_bytes(Image.fromarray(image((7, 9), "u2") * 257), "PNG"),
            image((7, 9), "u2") * 257,
        ),
        (
            "a.png",
            pillow_bytes(Image.fromarray(image((7, 9, 3))), "PNG"),
            image((7, 9, 3)),
        ),
        (
            "a.png",
            pillow_bytes(Image.fromarray(image((7, 9, 4))), "PNG"),
            image((7, 9, 4)),
        ),
        (
            "a.png",
            pillow_bytes(Image.fromarray(image((7, 9)) > 99), "PNG"),
            image((7, 9)) > 99,
        ),
        ("a.bmp", pillow_bytes(GREY_PALETTE, "BMP"), image((7, 9)) % 3 * 90),
        ("a.png", pillow_bytes(GREY_PALETTE, "PNG"), image((7, 9)) % 3 * 90),
        (
            "a.bmp",
            pillow_bytes(PALETTE, "BMP"),
            np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)[
                image((7, 9)) % 3
            ],
        ),
        (
            "a.png",
            pillow_bytes(PALETTE, "PNG"),
            np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)[
                image((7, 9)) % 3
            ],
        ),
        ("a.npy", npy_bytes(image((3, 7, 9), ">i4")), image((3, 7, 9), "i4")),
        ("a.npy", npy_bytes(np.asfortranarray(image((7, 9)))), image((7, 9))),
        ("png named.tif", npy_bytes(image((7, 9), "f4")), image((7, 9), "f4")),
        (
            "15 png named.tif",
            pillow_bytes(Image.fromarray(image((7, 9))), "PNG"),
            image((7, 9)),
        ),
    ],
)
def test_other_formats(
    name: str, content: bytes, expected: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    probe, found = io.probe(tmp_path / name), io.read_image(tmp_path / name)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype
    assert (probe.shape, probe.dtype) == (found.shape, found.dtype)
    assert found.flags.writeable


def test_jpeg(tmp_path: Path) -> None:
    flat = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    Image.fromarray(flat).save(tmp_path / "a.jpg", quality=95)
    assert io.probe(tmp_path / "a.jpg") == io.Probe(
        (16, 24, 3), np.dtype(np.uint8), "YXS", "jpeg"
    )
    assert np.abs(io.read_image(tmp_path / "a.jpg").astype(int) - flat).max() < 8
    with pytest.raises(ImageFileError, match="JPEG"):
        io.read_labels(tmp_path / "a.jpg")


def test_pillow_limit_is_neither_used_nor_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.fromarray(image((20, 20))).save(tmp_path / "a.png")
    assert io.read_image(tmp_path / "a.png").shape == (20, 20)
    assert Image.MAX_IMAGE_PIXELS == 10


# --- images: what is refused -----------------------------------------------------

WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
OFFSETS, SAMPLES, ROWS, COUNTS = 273, 277, 278, 279


def bare(next_page: int = 0, body: bytes = bytes(64 * 64), **changes: int) -> bytes:
    """Return a TIFF of 64 x 64 bytes, made by hand, with other values of its tags."""
    tags = {WIDTH: 64, LENGTH: 64, BITS: 8, COMPRESSION: 1, PHOTOMETRIC: 1}
    tags |= {OFFSETS: 8 + 2 + 9 * 12 + 4, SAMPLES: 1, ROWS: 64, COUNTS: len(body)}
    tags |= {int(key[1:]): value for key, value in changes.items()}
    entries = b"".join(
        struct.pack("<HHII", k, 4, 1, v) for k, v in sorted(tags.items())
    )
    page = struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_page)
    return b"II*\0" + struct.pack("<I", 8) + page + body


def test_the_bare_file_is_good(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(bare())
    np.testing.assert_array_equal(
        io.read_image(tmp_path / "a.tif"), np.zeros((64, 64), np.uint8)
    )


def ome(xml: str) -> bytes:
    return tiff_bytes(image((7, 9)), description=xml, metadata=None)


def ome_of(planes: int, file: str = "a.tif") -> str:
    return (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/'
        '2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" '
        f'Type="uint8" SizeX="9" SizeY="7" SizeZ="{planes}" SizeC="1" SizeT="1">'
        f'<TiffData><UUID FileName="{file}">urn:uuid:1</UUID></TiffData></Pixels>'
        "</Image></OME>"
    )


def png_of(width: int, height: int) -> bytes:
    """Return a black PNG, of which only the first rows are there."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    pack = zlib.compressobj(1)
    rows = bytes(width + 1)
    body = b"".join(pack.compress(rows) for _ in range(9)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


def bomb(unpacked: int, claim: int) -> bytes:
    """Return a TIFF of one deflated piece of zeros, which claims another size."""
    pack = zlib.compressobj(1)
    body = b"".join(pack.compress(bytes(2**20)) for _ in range(unpacked >> 20))
    width, length = 2**10, claim >> 10
    return bare(body=body + pack.flush(), t259=8, t256=width, t257=length, t278=length)


def npy_with(header: str) -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(16)


PAGES = tiff_bytes(image((3, 40, 50)), compression="zlib")
RAW = tiff_bytes(image((3, 40, 50)))
PNG = pillow_bytes(Image.fromarray(image((40, 50))), "PNG")
JPEG = pillow_bytes(Image.fromarray(image((40, 50))), "JPEG")
BAD: dict[str, Callable[[], bytes]] = {
    "1 empty": lambda: b"",
    "2 eight bytes": lambda: b"II*\0\x08\0\0\0",
    "3 raw TIFF cut at half": lambda: RAW[: len(RAW) // 2],
    "3 packed TIFF cut at half": lambda: PAGES[: len(PAGES) // 2],
    "3 PNG cut at half": lambda: PNG[: len(PNG) // 2],
    "3 JPEG cut at half": lambda: JPEG[: len(JPEG) // 2],
    "3 NPY cut": lambda: npy_bytes(image((40, 50)))[:-1],
    "4 width 2^31-1": lambda: bare(t256=2**31 - 1),
    "5 2^20 x 2^20": lambda: bare(t256=2**20, t257=2**20),
    "5 2^21 x 2^20": lambda: bare(t256=2**21, t257=2**20),
    "6 width 0": lambda: bare(t256=0),
    "7 no bits per sample": lambda: bare(t258=0),
    "8 3 bits per sample": lambda: bare(t258=3),
    "9 65,535 samples": lambda: bare(t277=65535),
    "10 pixels past the end": lambda: bare(t273=10**6),
    "10 pixels half past the end": lambda: bare(t273=1000),
    "11 unknown compression": lambda: bare(t259=9999),
    "12 pages in a circle": lambda: bare(next_page=8),
    "13 page past the end": lambda: b"II*\0" + struct.pack("<I", 10**6) + bytes(99),
    "13 next page past the end": lambda: bare(next_page=10**6),
    "14 text": lambda: b"x,y\n1,2\n",
    "16 deflate bomb": lambda: bomb(2**20, claim=1600 * 2**20),
    "16 deflate bomb that claims less": lambda: bomb(2**28, claim=2**20),
    "16 LZMA": lambda: bare(t259=34925),
    "17 black PNG of 20,000 x 20,000": lambda: png_of(20_000, 20_000),
    "25 complex NPY": lambda: npy_bytes(np.zeros((3, 3), np.complex64)),
    "25 complex TIFF": lambda: tiff_bytes(np.zeros((3, 3), np.complex64)),
    "no strip": lambda: bare(t279=0, t259=8),
    "rows are missing": lambda: bare(t278=16, t259=8),
    "NPY of objects": lambda: npy_bytes(np.array([[None]])),
    "NPY of text": lambda: npy_bytes(np.array([["a"]])),
    "NPY of records": lambda: npy_bytes(np.zeros((3, 3), [("a", "u1")])),
    "NPY of 7 axes": lambda: npy_bytes(np.zeros((1,) * 7)),
    "NPY of 1 axis": lambda: npy_bytes(np.zeros(9)),
    "NPY without pixels": lambda: npy_bytes(np.zeros((0, 9))),
    "NPY of a huge shape": lambda: npy_with(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    ),
    "NPY of a negative shape": lambda: npy_with(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2), }"
    ),
    "NPY with code": lambda: npy_with("__import__('os').mkdir('sprung')"),
    "NPY of another version": lambda: b"\x93NUMPY\x09\x00" + bytes(99),
    "PNG signature alone": lambda: PNG[:8],
    "JPEG signature alone": lambda: JPEG[:3],
    "BMP of 2^23 rows": lambda: b"".join(
        [(bmp := pillow_bytes(PALETTE, "BMP"))[:22], struct.pack("<i", 2**23), bmp[26:]]
    ),
    "BMP signature alone": lambda: b"BM",
    "BMP of noise": lambda: b"BM" + bytes(range(200)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_image_is_refused(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "cells.tif"
    path.write_bytes(BAD[case]())
    tracemalloc.start()
    try:
        with pytest.raises(ImageFileError) as error:
            io.read_image(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert message.startswith("`cells.tif` ")
    assert message.isprintable()
    assert len(message) < 450
    assert capfd.readouterr() == ("", "")
    assert names(tmp_path) == ["cells.tif"]


CLAIMS = [
    case
    for case in BAD
    if case[:2].strip() in {"1", "2", "4", "5", "6", "9", "17", "BM"}
]


@pytest.mark.parametrize("case", CLAIMS)
def test_the_header_alone_gives_it_away(case: str, tmp_path: Path) -> None:
    (tmp_path / "cells.tif").write_bytes(BAD[case]())
    with pytest.raises(ImageFileError):
        io.probe(tmp_path / "cells.tif")


@pytest.mark.parametrize(
    "xml",
    [
        ome_of(10**9),
        ome_of(1, "../../other.tif"),
        '<!DOCTYPE a [<!ENTITY b "'
        + "c" * 999
        + '"><!ENTITY d "'
        + "&b;" * 999
        + '">]>'
        "<OME>" + "&d;" * 999 + "</OME>",
    ],
    ids=["18 10^9 planes", "20 other file", "19 entity bomb"],
)
def test_claims_of_ome_are_not_believed(
    xml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (tmp_path / "other.tif").write_bytes(tiff_bytes(image((7, 9)) + 1))
    (folder / "a.ome.tif").write_bytes(ome(xml))
    seen = []
    opener = os.open
    monkeypatch.setattr(os, "open", lambda *a: seen.append(Path(a[0])) or opener(*a))
    tracemalloc.start()
    found = io.read_image(folder / "a.ome.tif")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    np.testing.assert_array_equal(found, image((7, 9)))
    assert seen == [folder / "a.ome.tif"]


def test_an_empty_mask_is_no_bomb(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(bomb(2**26, claim=2**26))
    assert not io.read_labels(tmp_path / "a.tif").any()
    (tmp_path / "b.png").write_bytes(png_of(2**14, 2**14) + bytes(2**18))
    assert io.probe(tmp_path / "b.png").shape == (2**14, 2**14)


@pytest.mark.parametrize(
    "content", [RAW, PAGES, tiff_bytes(image((9, 9)), tile=(16, 16))]
)
def test_every_cut_of_a_tiff_is_refused_or_harmless(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    whole = io.read_image(path)
    for length in range(0, len(content), 61):
        path.write_bytes(content[:length])
        try:
            found = io.read_image(path)
        except ImageFileError:
            continue
        np.testing.assert_array_equal(found, whole)


SEEDS = [
    bare(), tiff_bytes(image((2, 5, 6)), compression="zlib"),
    tiff_bytes(image((2, 5, 6), "u2"), imagej=True),
    tiff_bytes(image((5, 6, 3)), photometric="rgb"),
    PNG, JPEG, pillow_bytes(PALETTE, "BMP"), npy_bytes(image((5, 6))),
]  # fmt: skip


@settings(max_examples=150)
@given(content=st.sampled_from(SEEDS), data=st.data())
def test_damaged_images_give_an_array_or_our_error(
    content: bytes, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(changed), 400) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.tif"
    path.write_bytes(bytes(changed))
    try:
        found = io.read_image(path)
    except ImageFileError:
        return
    assert 2 <= found.ndim <= 6
    assert found.size
    assert found.dtype.kind in "buif"


@pytest.mark.parametrize("reader", [io.probe, io.read_image, io.read_labels])
def test_what_is_no_file_is_refused(reader: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ImageFileError, match=r"no file `none\.tif`"):
        reader(tmp_path / "none.tif")
    with pytest.raises(ImageFileError, match="folder"):
        reader(tmp_path)
    with pytest.raises(ImageFileError, match="cannot be opened"):
        reader("a\0b.tif")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_and_device_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tif")
    for path in (tmp_path / "pipe.tif", "/dev/zero"):
        with pytest.raises(ImageFileError, match="pipe or a device"):
            io.read_image(path)
    with pytest.raises(ImageFileError, match="pipe or a device"):
        io.list_images(tmp_path / "pipe.tif")


# --- labels ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".npy", ".png"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "bool", "i8", "u8"])
def test_labels_round_trip(suffix: str, dtype: str, tmp_path: Path) -> None:
    labels = (image((7, 9)) % 3).astype(dtype)
    path = tmp_path / f"labels{suffix}"
    io.write_labels(path, labels)
    found = io.read_labels(path)
    np.testing.assert_array_equal(found, labels)
    assert found.dtype == (np.uint16 if dtype == "u2" else np.uint8)
    with pytest.raises(SaveError, match="exists"):
        io.write_labels(path, labels)
    io.write_labels(path, labels * 0, overwrite=True)
    assert not io.read_labels(path).any()


@pytest.mark.parametrize("shape", [(3, 7, 9), (3, 7, 3), (2, 3, 7, 9), (1, 7, 9)])
@pytest.mark.parametrize("dtype", ["u1", "i4", "u4"])
def test_stacks_of_labels_round_trip(
    shape: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    labels = image(shape, dtype) * 1001 if dtype != "u1" else image(shape)
    for name in ("a.tif", "a.npy"):
        io.write_labels(tmp_path / name, labels)
        found = io.read_labels(tmp_path / name)
        np.testing.assert_array_equal(found.reshape(shape), labels)
        assert found.dtype == labels.dtype


def test_label_files_are_packed_and_plain(tmp_path: Path) -> None:
    io.write_labels(tmp_path / "a.tif", np.zeros((512, 512), np.uint8))
    assert (tmp_path / "a.tif").stat().st_size < 4000
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages[0].compression == 8


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([0, 70_000], "u4"), ([-1, 3], "i2"), ([0, 2**40], "u8"), ([-1, 200], "i2")],
)
def test_64_bit_labels_shrink_to_what_holds_them(
    values: list[int], dtype: str, tmp_path: Path
) -> None:
    io.write_labels(tmp_path / "a.tif", np.array([values], np.int64))
    found = io.read_labels(tmp_path / "a.tif")
    np.testing.assert_array_equal(found, [values])
    assert found.dtype == np.dtype(dtype)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("a.jpg", np.zeros((3, 3), np.uint8)),
        ("a", np.zeros((3, 3), np.uint8)),
        ("a.png", np.zeros((2, 3, 3), np.uint8)),
        ("a.png", np.full((3, 3), -1)),
        ("a.png", np.full((3, 3), 70_000)),
        ("a.tif", np.zeros((3, 3), np.float32)),
        ("a.tif", np.zeros(3, np.uint8)),
        ("a.tif", np.zeros((0, 3), np.uint8)),
    ],
)
def test_labels_that_do_not_fit_are_not_written(
    name: str, labels: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"[Ll]abels"):
        io.write_labels(tmp_path / name, labels)
    assert names(tmp_path) == []


def test_masks_keep_their_values(tmp_path: Path) -> None:
    mask = np.where(image((7, 9)) > 99, 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "a.png")
    np.testing.assert_array_equal(io.read_labels(tmp_path / "a.png"), mask)


def test_a_palette_gives_its_indices_as_labels(tmp_path: Path) -> None:
    PALETTE.save(tmp_path / "a.png")
    np.testing.assert_array_equal(io.read_labels(tmp_path / "a.png"), image((7, 9)) % 3)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_no_grey_levels(bits: int, tmp_path: Path) -> None:
    labels = np.arange(2**bits, dtype=np.uint8)[None].repeat(4, 0)
    picture = Image.fromarray(labels)
    picture.putpalette([c for c in range(256) for _ in range(3)])
    picture.save(tmp_path / "a.png", bits=bits)
    np.testing.assert_array_equal(io.read_labels(tmp_path / "a.png"), labels)


@pytest.mark.parametrize("samples", [3, 4])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_grey_colours_are_labels_and_others_are_not(
    samples: int, name: str, tmp_path: Path
) -> None:
    grey = np.repeat(image((7, 9))[..., None], samples, -1)
    if samples == 4:
        grey[..., 3] = 255
    Image.fromarray(grey).save(tmp_path / name)
    np.testing.assert_array_equal(io.read_labels(tmp_path / name), image((7, 9)))
    grey[0, 0, 1] += 1
    Image.fromarray(grey).save(tmp_path / name)
    with pytest.raises(ImageFileError, match="colours"):
        io.read_labels(tmp_path / name)


def test_planes_of_colours_are_seen_too(tmp_path: Path) -> None:
    array = image((3, 7, 9))
    options = {"photometric": "rgb", "planarconfig": "separate"}
    (tmp_path / "a.tif").write_bytes(tiff_bytes(array, **options))
    with pytest.raises(ImageFileError, match="colours"):
        io.read_labels(tmp_path / "a.tif")


def test_whole_floats_are_labels(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff_bytes(image((7, 9), "f4")))
    found = io.read_labels(tmp_path / "a.tif")
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, image((7, 9)))


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, 1e20])
def test_other_floats_are_not(value: float, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(npy_bytes(np.full((3, 3), value)))
    with pytest.raises(ImageFileError, match="whole numbers"):
        io.read_labels(tmp_path / "a.npy")


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3), (7, 9, 4)])
def test_pictures(shape: tuple[int, ...], tmp_path: Path) -> None:
    io.write_png(tmp_path / "a.png", image(shape)[::-1])
    np.testing.assert_array_equal(io.read_image(tmp_path / "a.png"), image(shape)[::-1])
    with pytest.raises(SaveError, match="exists"):
        io.write_png(tmp_path / "a.png", image(shape))


@pytest.mark.parametrize(
    "pixels", [np.zeros((7, 9)), np.zeros((7, 9, 2), np.uint8), np.zeros(9, np.uint8)]
)
def test_what_is_no_picture_is_refused(pixels: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        io.write_png(tmp_path / "a.png", pixels)


# --- folders ---------------------------------------------------------------------


def touch(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def test_list_images(tmp_path: Path) -> None:
    touch(tmp_path, "b.TIF", "a.png", "c.jpeg", "notes.txt", ".hidden.tif", "d.npy")
    (tmp_path / "folder.tif").mkdir()
    assert [p.name for p in io.list_images(tmp_path)] == [
        "a.png", "b.TIF", "c.jpeg", "d.npy",
    ]  # fmt: skip
    assert io.list_images(str(tmp_path / "a.png")) == [tmp_path / "a.png"]


def test_list_images_without_images(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    with pytest.raises(ImageFileError, match=r"has no image \(\.tif, \.tiff, \.png"):
        io.list_images(tmp_path)
    with pytest.raises(ImageFileError, match="neither a folder nor"):
        io.list_images(tmp_path / "notes.txt")
    with pytest.raises(ImageFileError, match="no file"):
        io.list_images(tmp_path / "none.tif")


def test_pairs(tmp_path: Path) -> None:
    images = touch(tmp_path / "images", "b.tif", "a.tif", "u\u0308.tif")
    labels = touch(tmp_path / "labels", "\u00fc.png", "a.png", "b.png")
    pairs = io.pair_by_stem(images, labels)
    assert [(a.name, b.name) for a, b in pairs] == [
        ("b.tif", "b.png"), ("a.tif", "a.png"), ("u\u0308.tif", "\u00fc.png"),
    ]  # fmt: skip


def test_orphans_are_named_up_to_ten() -> None:
    images = [Path(f"i{i:02}.tif") for i in range(12)] + [Path("both.tif")]
    with pytest.raises(ValueError, match="same name") as error:
        io.pair_by_stem(images, [Path("both.png"), Path("lone.png")])
    message = str(error.value)
    assert "i00.tif, i01.tif" in message
    assert "i09.tif and 2 more" in message
    assert "i10.tif" not in message
    assert "Annotations without: lone.png" in message
    with pytest.raises(ValueError, match="Images without: none"):
        io.pair_by_stem([], [Path("lone.png")])


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images have the same name .*: a.png"):
        io.pair_by_stem([Path("a.tif"), Path("a.png")], [Path("a.tif")])
    with pytest.raises(ValueError, match="annotations have the same name"):
        io.pair_by_stem([Path("a.tif")], [Path("x/a.tif"), Path("y/a.tif")])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/me/a.tif", "a.tif"),
        ("a\n\u202eb\x1b[31m", "a??b?[31m"),
        ("/", "/"),
        ("x" * 100 + ".safetensors", "x" * 40 + "..." + "x" * 9 + ".safetensors"),
        (b"a\xff.tif", "a?.tif"),
    ],
)
def test_shown_names_are_plain_and_short(path: Any, expected: str) -> None:
    assert io.shown(path) == expected
