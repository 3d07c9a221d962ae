"""Tiled against whole prediction on trained networks, and one large picture.

    python benchmarks/seams.py --steps 40 --picture seams.png

For every network: 5 odd sizes x 6 tile sizes; the largest difference of a probability,
how many labels differ, and how many of those where the two best classes are further
than 1e-3 apart (must be 0).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from napari_unetpp import api, io, samples

SIZES = ((1, 1), (37, 211), (129, 97), (255, 301), (383, 259))
TILES = (32, 64, 96, 128, 160, 256)
COLOURS = np.array(
    [[0, 0, 0], [86, 180, 233], [230, 159, 0], [204, 121, 167]], np.uint8
)


def compare(
    model: api.Model, image: np.ndarray, depth: int | None
) -> tuple[float, int, int, int]:
    """Return the largest difference, labels that differ, without a tie, and pixels."""
    worst, differ, wrong, pixels = 0.0, 0, 0, 0
    for height, width in SIZES:
        part = image[:height, :width]
        whole = api.predict_proba(model, part, channel_axis=-1, depth=depth, tile=16384)
        best = np.sort(whole, axis=0)
        clear = best[-1] - best[-2] > 1e-3
        for tile in TILES:
            tiled = api.predict_proba(
                model, part, channel_axis=-1, depth=depth, tile=tile
            )
            worst = max(worst, float(np.abs(tiled - whole).max()))
            other = tiled.argmax(0) != whole.argmax(0)
            differ += int(other.sum())
            wrong += int((other & clear).sum())
            pixels += other.size
    return worst, differ, wrong, pixels


def main() -> None:
    """Print a line per network and depth; write the picture if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--networks", default=",".join(api.NETWORKS))
    parser.add_argument("--picture")
    args = parser.parse_args()
    torch.set_num_threads(2)
    sample = samples.load("immunohistochemistry")
    for name in args.networks.split(","):
        model = api.train(
            sample.image,
            sample.strokes,
            network=name,
            classes=sample.classes,
            channel_axis=-1,
            max_steps=args.steps,
        )
        for depth in model.network.depths:
            worst, differ, wrong, pixels = compare(model, sample.image, depth)
            print(
                f"{name:12s} depth {depth}: largest difference {worst:.1e}; labels "
                f"differ at {differ} of {pixels} pixels, {wrong} without a tie",
                flush=True,
            )
        if name == "unet++" and args.picture:
            large = np.tile(sample.image, (3, 4, 1))
            labels = api.predict(model, large, channel_axis=-1, tile=256)
            whole = api.predict(model, large, channel_axis=-1, tile=16384)
            print(
                f"large picture {labels.shape}: "
                f"{int((labels != whole).sum())} labels differ"
            )
            shown = large // 2 + COLOURS[labels] // 2
            io.write_png(args.picture, shown, overwrite=True)


if __name__ == "__main__":
    main()
