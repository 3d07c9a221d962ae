"""One image larger than memory: peak memory, time per megapixel, kills, workers.

    python benchmarks/bigimage.py sizes --megapixels 64,256,1024 --folder /big/disk
    python benchmarks/bigimage.py kills --kills 20
    python benchmarks/bigimage.py workers

The images are photographs of scikit-image tiled to any size, each copy with its own
grey values. `sizes` runs each size in a process of its own and asks the system for its
peak memory, which must not depend on the size. `kills` ends the command line with
SIGKILL at random moments until it is done, `workers` shares the work between two
processes and kills one; both compare with an undisturbed run, pixel by pixel.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIDE = 1024  # px of a chunk of the image


def make_image(path: Path, megapixels: float, seed: int = 0) -> None:
    """Write a square image of real texture, chunk by chunk."""
    import zarr
    from skimage import color, data

    photographs = [data.brick(), data.grass(), data.gravel(), data.camera()]
    photographs += [(255 * color.rgb2gray(data.immunohistochemistry())).astype("u1")]
    tile = np.concatenate([p[:512, :512] for p in photographs], 1)
    tile = np.tile(tile, (2, 1))
    side = int(round((megapixels * 1e6) ** 0.5 / 64) * 64)
    shutil.rmtree(path, ignore_errors=True)
    array = zarr.create_array(path, shape=(side, side), chunks=(SIDE, SIDE), dtype="u1")
    rng = np.random.default_rng(seed)
    for y in range(0, side, SIDE):
        for x in range(0, side, SIDE):
            moved = np.roll(tile, rng.integers(0, 2560, 2), (0, 1))[:SIDE, :SIDE]
            scaled = moved * rng.uniform(0.6, 1) + rng.uniform(0, 50)
            height, width = min(SIDE, side - y), min(SIDE, side - x)
            array[y : y + height, x : x + width] = scaled[:height, :width].astype("u1")


def to_tiff(source: Path, path: Path) -> None:
    """Write a Zarr image as a compressed, tiled TIFF."""
    import tifffile
    import zarr

    array = zarr.open_array(source, mode="r")
    height, width = array.shape
    tifffile.imwrite(
        path,
        (
            array[y : y + 512, x : x + 512]
            for y in range(0, height, 512)
            for x in range(0, width, 512)
        ),
        shape=array.shape, dtype=array.dtype, tile=(512, 512), compression="zlib",
        photometric="minisblack",
    )  # fmt: skip


def make_model(path: Path, depth: int) -> None:
    """Learn a little, so that the labels are no constant."""
    from napari_unetpp import api, samples

    sample = samples.load("coins")
    model = api.train(
        sample.image, sample.strokes, network="unet++", classes=sample.classes,
        max_steps=20, device="cpu",
    )  # fmt: skip
    (model if depth == 4 else model.pruned(depth)).save(path, overwrite=True)


def memory(key: str) -> float:
    """Return a figure of this process that Linux keeps, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(n.split()[1]) / 1024 for n in lines if n.startswith(key))


def label_once(model: Path, image: Path, out: Path) -> None:
    """Label in this process; print what the system says it took."""
    from napari_unetpp import api

    loaded = api.load_model(model)
    # What is needed for any image: the libraries, and a first tile.
    api.predict(loaded, np.random.default_rng(0).random((700, 700)), tile=512)
    base = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    begun = time.perf_counter()
    seen: dict[str, float] = {}
    quarters = [0.0] * 4
    for step in api.predict_to_zarr_steps(loaded, image, out, overwrite=True):
        seen.setdefault(step.state, time.perf_counter() - begun)
        if step.state == "tile":
            now = min(3, 4 * step.done // step.total)
            quarters[now] = max(quarters[now], memory("VmRSS"))
        total = step.total
    seconds = time.perf_counter() - begun
    tiles = seen.get("pyramid", seconds) - seen["started"]
    row = {
        "Mpx": total / 1e6,
        "base_MB": base,
        "peak_MB": memory("VmHWM"),
        "s_per_Mpx": seconds / total * 1e6,
        "tiles_s_per_Mpx": tiles / total * 1e6,
    }
    # Between two tiles, the most in each quarter of the run.
    row |= {f"rss_{n}": value for n, value in enumerate(quarters, start=1)}
    print(json.dumps(row))


def command(model: Path, image: Path, out: Path, *more: str) -> list[str]:
    """Return the command line that labels."""
    return [
        sys.executable, "-m", "napari_unetpp", "predict", str(model), str(image), "-o",
        str(out), *more,
    ]  # fmt: skip


def sizes(folder: Path, model: Path, megapixels: list[float], tiff: bool) -> None:
    """Print memory and time for each size, and the slope of the memory."""
    rows = []
    for size in megapixels:
        image, out = folder / "image.zarr", folder / "labels.zarr"
        make_image(image, size)
        if tiff:
            image = folder / "image.tif"
            to_tiff(folder / "image.zarr", image)
        call = [sys.executable, __file__, "once", "--paths", str(model), str(image),
                str(out)]  # fmt: skip
        done = subprocess.run(call, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout))
        print({k: round(v, 3) for k, v in rows[-1].items()}, flush=True)
    if len(rows) > 1:
        x, y = ([row[key] for row in rows] for key in ("Mpx", "peak_MB"))
        print(f"slope of the peak: {100 * np.polyfit(x, y, 1)[0]:.2f} MB per 100 Mpx")


def labels_of(path: Path) -> np.ndarray:
    """Return all levels of a label image in one row."""
    import zarr

    group = zarr.open_group(path, mode="r")
    levels = [np.asarray(group[k][...]).ravel() for k in sorted(group.array_keys())]
    return np.concatenate(levels)


def kills(folder: Path, model: Path, count: int, megapixels: float) -> None:
    """Kill the command at random moments, go on, and compare."""
    image, whole, out = (folder / f"{n}.zarr" for n in ("image", "whole", "killed"))
    make_image(image, megapixels)
    begun = time.perf_counter()
    subprocess.run(command(model, image, whole), check=True, capture_output=True)
    seconds = time.perf_counter() - begun
    expected = labels_of(whole)
    rng = random.Random(0)
    killed = rounds = differ = left = 0
    while killed < count:
        rounds += 1
        while not out.exists():
            process = subprocess.Popen(
                command(model, image, out),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                process.wait(rng.uniform(0.3, 0.7) * seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
        differ += int((labels_of(out) != expected).sum())
        left += len(list(folder.rglob("*.part*")))
        shutil.rmtree(out)
    print(
        f"{killed} kills in {rounds} runs of {megapixels:g} Mpx ({seconds:.1f} s "
        f"undisturbed): {differ} pixels differ, {left} unfinished files left"
    )


def workers(folder: Path, model: Path, megapixels: float) -> None:
    """Share the work between two processes; then again, and kill one."""
    import psutil

    image, whole = folder / "image.zarr", folder / "whole.zarr"
    make_image(image, megapixels)
    seconds = []
    for name, more in (("whole", ()), ("two", ("--workers", "2"))):
        begun = time.perf_counter()
        done = command(model, image, folder / f"{name}.zarr", *more)
        subprocess.run(done, check=True, capture_output=True)
        seconds.append(time.perf_counter() - begun)
    expected = labels_of(whole)
    differ = int((labels_of(folder / "two.zarr") != expected).sum())
    print(f"two workers: {differ} pixels differ; {seconds[0]:.1f} s alone, ", end="")
    print(f"{seconds[1]:.1f} s by two, {megapixels:g} Mpx")
    out = folder / "killed.zarr"
    process = subprocess.Popen(command(model, image, out, "--workers", "2"))
    manifest = folder / "killed.zarr.part" / "manifest.txt"
    while not manifest.exists() or len(manifest.read_bytes().splitlines()) < 5:
        time.sleep(0.05)
    busy = [
        p for p in psutil.Process(process.pid).children(recursive=True)
        if p.memory_info().rss > 150e6
    ]  # fmt: skip
    busy[0].kill()
    code = process.wait()
    differ = int((labels_of(out) != expected).sum())
    print(f"one of {len(busy)} killed: exit code {code}, {differ} pixels differ")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("sizes", "kills", "workers", "once"))
    parser.add_argument("--folder", type=Path, help="where there is room")
    parser.add_argument("--megapixels", default="4")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tiff", action="store_true", help="the image is a TIFF")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--paths", type=Path, nargs=3)
    options = parser.parse_args()
    if options.what == "once":
        label_once(*options.paths)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the workers have it
    megapixels = [float(n) for n in options.megapixels.split(",")]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        model = folder / "model.safetensors"
        make_model(model, options.depth)
        if options.what == "sizes":
            sizes(folder, model, megapixels, options.tiff)
        elif options.what == "kills":
            kills(folder, model, options.kills, megapixels[0])
        else:
            workers(folder, model, megapixels[0])


if __name__ == "__main__":
    main()
