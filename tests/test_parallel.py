"""Two processes learn what one does, and none is left waiting for a lost one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from napari_unetpp import api, io
from napari_unetpp.parallel import Team, team

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

_TRAIN = """
import sys
import numpy as np
from napari_unetpp import api, parallel

data = np.load(sys.argv[1] + "/data.npz")
ask = {"config": api.TrainConfig(**CONFIG), **ASK}
with parallel.together("cpu") as device:
    model = api.train(data["image"], data["strokes"], device=device, **ask)
    model.save(f"{sys.argv[1]}/rank{parallel.team().rank}.safetensors")
"""


def data() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.indices((160, 160))
    image = np.where(x < 80, 60 * (y % 6 < 3), 60 * ((x + y) % 6 < 3))
    image = image + np.random.default_rng(0).normal(90, 8, image.shape)
    strokes = np.zeros(image.shape, np.uint8)
    strokes[8:-8, 20:30] = 1
    strokes[8:-8, 120:130] = 2
    return image.clip(0, 255).astype(np.uint8), strokes


def start(arguments: list[str], size: int = 2) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = []
    for rank in range(size):
        places = {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        } if size > 1 else {}  # fmt: skip
        found.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", **places},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return found


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        texts = [p.communicate(timeout=200) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *t) for p, t in zip(processes, texts, strict=True)]


@pytest.mark.parametrize(
    ("network", "config"),
    [
        ("unet++", {"warp_after": 5}),
        ("unet", {"loss": "dice", "optimizer": "sgd"}),
    ],
)
def test_two_processes_learn_what_one_does(
    tmp_path: Path, network: str, config: dict[str, Any]
) -> None:
    image, strokes = data()
    np.savez(tmp_path / "data.npz", image=image, strokes=strokes)
    ask = {"network": network, "max_steps": 20, "seed": 3}
    config |= {"patch": 64, "mixed_precision": False, "pooled_norms": False}
    code = _TRAIN.replace("CONFIG", repr(config)).replace("ASK", repr(ask))
    processes = start(["-c", code, str(tmp_path)])
    one = api.train(
        image, strokes, device="cpu", config=api.TrainConfig(**config), **ask
    )
    for rc, _, told in end(processes):
        assert rc == 0, told[-500:]
    two = [api.load_model(tmp_path / f"rank{n}.safetensors") for n in range(2)]
    loss, first, second = ([s.loss for s in m.history] for m in (one, *two))
    assert len(loss) == 20
    assert first == second
    np.testing.assert_allclose(first, loss, rtol=0, atol=1e-5)
    alone, first, second = (m.network.state_dict() for m in (one, *two))
    for name in alone:
        np.testing.assert_array_equal(first[name], second[name])
    apart = [(first[name] - v).abs().ravel() for name, v in alone.items()]
    # Adam divides by a gradient's size: where that is nothing but rounding, a single
    # weight may go another way.
    assert np.quantile(torch.cat(apart), 0.99999) < 1e-5


def folders(tmp_path: Path) -> list[str]:
    image, strokes = data()
    io.write_png(tmp_path / "image.png", image)
    io.write_labels(tmp_path / "strokes.tif", strokes)
    return [
        "-m", "napari_unetpp", "train", str(tmp_path / "image.png"),
        str(tmp_path / "strokes.tif"), "-o", str(tmp_path / "m.safetensors"),
        "--unlabelled", "0", "--network", "unet", "--checkpoint-seconds", "0",
        "--device", "cpu",
    ]  # fmt: skip


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_all_and_the_training_goes_on(
    tmp_path: Path, lost: int
) -> None:
    command = folders(tmp_path)
    checkpoint = tmp_path / "m.checkpoint.safetensors"
    processes = start([*command, "--seconds", "600"])
    while not checkpoint.exists():
        assert all(p.poll() is None for p in processes)
        processes[0].poll()
        try:
            processes[1].wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    processes[lost].kill()
    found = end(processes)
    assert found[lost][0] != 0
    code, out, told = found[1 - lost]
    assert (code, out) == (1, "")
    assert "another one has ended" in told
    assert not (tmp_path / "m.safetensors").exists()
    kept = api.load_model(checkpoint).history[-1].step
    again = end(start([*command, "--steps", str(kept + 2), "--resume"]))
    assert [code for code, *_ in again] == [0, 0], again[0][2][-500:]
    assert again[1][1] == ""
    assert "unet" in again[0][1]
    assert api.load_model(tmp_path / "m.safetensors").history[-1].step == kept + 2
    assert not checkpoint.exists()


def test_torchrun_starts_the_command(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ((code, out, told),) = end(
        start([*launch, *folders(tmp_path), "--steps", "3", "--json"], 1)
    )
    assert code == 0, told[-500:]
    assert out.count('"steps": 3') == 1
    assert api.load_model(tmp_path / "m.safetensors").history[-1].step == 3


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    assert team() == Team(0, 1)
    assert Team(1, 2).share(6) == slice(3, 6)
    with pytest.raises(ValueError, match=r"multiple of the number of processes, 2.*3"):
        Team(1, 2).share(3)
