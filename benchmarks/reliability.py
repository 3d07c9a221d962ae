"""Files that lie or are damaged, by the million: what the readers make of them.

    python benchmarks/reliability.py model --seconds 900
    python benchmarks/reliability.py damage --count 1000

`model` changes a model file piece by piece; in half of the inputs the checksum is made
right again, so that what lies behind it is reached. Nothing but `ModelFileError` may
come out, and nothing accepted may have other weights than the file says. `damage` cuts,
flips and deletes in a model file (a checkpoint is one, too) and in a recovery file: all
must be reported.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from napari_unetpp import modelfile, recovery
from napari_unetpp.errors import ModelFileError, RecoveryFileError

ODD: list[Any] = [
    0, -1, 1, 2, 2**31, 2**63, 2**64 - 1, 1.5, 1e308, True, None, "", "3", "F32", "F16",
    "I64", "I32", [], {}, [0, 4], [4, 0], [2**62, 4], "\0", "../x", "<b>", "\u202e",
]  # fmt: skip


def small_model() -> bytes:
    """Return a model file of three tensors."""
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.normal(size=(2, 1, 3, 3)).astype(np.float32),
        "b": np.array([1.5, -2.0], np.float16),
        "c": np.array(7, np.int64),
    }
    config = {"name": "unet++", "levels": 2, "classes": ["a", "b"]}
    return modelfile.encode(arrays, config=config, provenance={"seed": 0})


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the weights."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any], body: bytes, *, seal: bool) -> bytes:
    """Return a file, its checksum made right if wished."""
    table = {k: v for k, v in header.items() if k != "__metadata__"}
    metadata = header.get("__metadata__")
    if seal and isinstance(metadata, dict):
        named = {k: v for k, v in metadata.items() if k != "sha256"}
        text = json.dumps([table, named], sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode() + body).hexdigest()
        header = {"__metadata__": {**named, "sha256": digest}, **table}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def change(rng: random.Random, node: Any) -> None:
    """Change, add, delete or rename something somewhere below a node."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        below = node[key]
        if not (isinstance(below, (dict, list)) and rng.random() < 0.7):
            break
        node = below
    what = rng.randrange(4)
    if what == 0:
        node[key] = copy.deepcopy(rng.choice(ODD))
    elif what == 1:
        del node[key]
    elif what == 2 and isinstance(node, dict):
        node[str(rng.choice(ODD))] = node.pop(key)
    elif isinstance(below, int) and not isinstance(below, bool):
        node[key] = below + rng.choice([-4, -1, 1, 4])
    else:
        node[key] = copy.deepcopy(node[rng.choice(keys)])


def bytes_changed(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat or move bytes."""
    raw = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        i, j = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        what = rng.randrange(4)
        if what == 0 and i < len(raw):
            raw[i] ^= 1 << rng.randrange(8)
        elif what == 1:
            del raw[i : min(j, i + rng.choice([1, 8, 64]))]
        elif what == 2:
            raw[i:i] = raw[i : min(j, i + 64)]
        else:
            raw[i:i] = rng.randbytes(rng.choice([1, 4, 8]))
    return bytes(raw)


def mutated(rng: random.Random, data: bytes, *, seal: bool) -> bytes:
    """Return a changed file: its header's tree, its weights, or any of its bytes."""
    header, body = split(data)
    if not seal and rng.random() < 0.5:
        return bytes_changed(rng, data)
    for _ in range(rng.randint(1, 3)):
        change(rng, header)
    if rng.random() < 0.2:
        body = bytes_changed(rng, body)
    return join(header, body, seal=seal)


def as_written(file: modelfile.ModelFile, data: bytes) -> bool:
    """Whether what was accepted is what an independent reading of the bytes gives."""
    header, body = split(data)
    kinds = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
    header.pop("__metadata__")
    for name, entry in header.items():
        if entry["dtype"] == "BF16":
            continue
        start, end = entry["data_offsets"]
        array = np.frombuffer(body[start:end], kinds[entry["dtype"]])
        array = array.reshape(entry["shape"])
        if not np.array_equal(array, file.tensors[name]):
            return False
    return set(header) == set(file.tensors)


def fuzz_model(count: int, seconds: float, seed: int = 0) -> dict[str, int]:
    """Count what came of `count` inputs, or of what the time allows."""
    good, rng = small_model(), random.Random(seed)
    weights = {k: v.tobytes() for k, v in modelfile.decode(good).tensors.items()}
    told = {"inputs": 0, "refused": 0, "accepted": 0, "wrong": 0, "untyped": 0}
    end = time.monotonic() + seconds
    while told["inputs"] < count and time.monotonic() < end:
        seal = told["inputs"] % 2 == 0
        told["inputs"] += 1
        data = mutated(rng, good, seal=seal)
        try:
            file = modelfile.decode(data)
        except ModelFileError:
            told["refused"] += 1
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            told["untyped"] += 1
            print(f"{type(error).__name__}: {error}: {data!r}")
        else:
            told["accepted"] += 1
            found = {k: v.tobytes() for k, v in file.tensors.items()}
            # Without a new checksum nothing may differ; with one, only as it says.
            if not (as_written(file, data) if seal else found == weights):
                told["wrong"] += 1
                print(f"other weights: {data!r}")
    return told


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes with one bit flipped, cut, or with some deleted or zeroed."""
    at = rng.randrange(len(data))
    what = rng.randrange(4)
    if what == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if what == 1:
        return data[:at]
    size = rng.choice([1, 16, 512])
    piece = bytes(size) if what == 2 else b""
    return data[:at] + piece + data[at + size :]


def damage(count: int, seed: int = 0) -> dict[str, int]:
    """Damage files in `count` ways each; count what was not reported."""
    rng = random.Random(seed)
    labels = np.random.default_rng(0).integers(0, 3, (64, 64)).astype(np.uint8)
    note = recovery.Note("a" * 32, "cells")
    files = {
        ".safetensors": small_model(),
        ".labels": recovery.to_bytes(note, recovery.pack(labels)),
    }
    told = {"damages": 0, "same": 0, "silent": 0}
    with tempfile.TemporaryDirectory() as folder:
        for suffix, data in files.items():
            path = Path(folder) / f"a{suffix}"
            for _ in range(count):
                changed = damaged(rng, data)
                told["damages"] += 1
                if changed == data:
                    told["same"] += 1
                    continue
                path.write_bytes(changed)
                try:
                    if suffix == ".labels":
                        recovery.read(path)
                    else:
                        modelfile.read(path)
                except (ModelFileError, RecoveryFileError):
                    continue
                told["silent"] += 1
    return told


def main() -> None:
    """Run one of the modes and print its counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["model", "damage"])
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.mode == "model":
        print(fuzz_model(options.count, options.seconds, options.seed))
    else:
        print(damage(options.count, options.seed))


if __name__ == "__main__":
    main()
