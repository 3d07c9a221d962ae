"""Every save is broken at each of its system calls, killed, and short of everything.

    python benchmarks/faults.py calls          # SIGKILL and five errors at every call
    python benchmarks/faults.py kills          # SIGKILL at 1,000 random moments
    python benchmarks/faults.py places         # full disk, read-only, ... (as root)
    python benchmarks/faults.py pairs          # two of everything on one folder

`calls` and `places` need strace. All that is imported is imported once; each save runs
in a fork of this process that waits until strace has hold of it, so that only its own
calls are counted. Ends with 1 if a save lost something, or a control was not caught.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io as buffers
import itertools
import json
import logging
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import tifffile
import torch
import torch._dynamo  # any optimizer imports it at its first step

from napari_unetpp import api, checkpoint, io, modelfile, record, recovery
from napari_unetpp.checkpoint import Rolling
from napari_unetpp.cli import main as command_line
from napari_unetpp.errors import SaveError, UnetppError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CALLS = """write pwrite64 writev pwritev fsync fdatasync rename renameat renameat2 link
    linkat symlink symlinkat unlink unlinkat rmdir mkdir mkdirat truncate ftruncate
    chmod fchmod fchmodat open openat copy_file_range sendfile""".split()
ERRORS = ("ENOSPC", "EIO", "EACCES", "EROFS", "EINTR")
TIDYING = ("unlink", "unlinkat", "rmdir")
KILLED, TOLD, UNTYPED, FAULT = -signal.SIGKILL, 10, 11, 20

NET = api.NetConfig("unet", width=4, levels=2)
CONFIG = api.TrainConfig(
    patch=32, batch=1, pretrained=False, score_every=2, edges=0, averaging=0
)


def scene(seed: int, side: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of a bright square and strokes on both classes."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (side, side)).astype(np.uint8)
    image[side // 4 : -side // 4, side // 4 : -side // 4] += 150
    strokes = np.zeros((side, side), np.uint8)
    strokes[2:6, 2:-2] = 1
    strokes[side // 3 : -side // 3, side // 3 : -side // 3] = 2
    return image, strokes


IMAGE, STROKES = scene(0)
NOTES = [np.roll(STROKES, n, axis=1) for n in range(3)]


@functools.cache
def network(seed: int) -> api.Model:
    """Return a small model."""
    return api.create_model(NET, classes=("ground", "square"), seed=seed)


def digest(*arrays: Any) -> str:
    """Return what tells these arrays from others."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{np.shape(array)}".encode() + np.asarray(array).tobytes())
    return found.hexdigest()[:12]


def weights(model: api.Model) -> str:
    """Return what tells a model from others."""
    return digest(*model.network.state_dict().values())


# --- what saves ------------------------------------------------------------------


@dataclass(frozen=True)
class Saver:
    """Something that saves, what a reader sees of it, and its next start.

    Attributes
    ----------
    old, save, again : callable
        Take a folder: make what stands there before, save, and save again or tidy up.
    seen : callable
        What a reader finds, part by part; each must be the old or the new one.
    goes_on : bool
        Whether an unfinished result is kept, with which `again` goes on.
    control : bool
        Whether it saves badly, so that it must be found out.
    """

    old: Callable[[Path], None]
    save: Callable[[Path], None]
    seen: Callable[[Path], tuple[str, ...]]
    again: Callable[[Path], None] | None = None
    goes_on: bool = False
    control: bool = False


FILE = "m.safetensors"


def model_seen(folder: Path) -> tuple[str, ...]:
    """Return what a reader finds in the model file."""
    return (weights(api.load_model(folder / FILE)),)


def in_place(folder: Path) -> None:
    """Save as it should not be done: over the old file."""
    network(2).save(folder / "spare.safetensors", overwrite=True)
    data = (folder / "spare.safetensors").read_bytes()
    (folder / FILE).write_bytes(data)


def careless(folder: Path) -> None:
    """Save beside the old file, but say nothing of errors and leave things lying."""
    network(2).save(folder / "spare.safetensors", overwrite=True)
    part = folder / ".m.part"
    with contextlib.suppress(OSError):
        part.write_bytes((folder / "spare.safetensors").read_bytes())
        part.replace(folder / FILE)


def checkpoint_old(folder: Path) -> None:
    """Leave a training after two steps, and beside it one after four."""
    ask: dict[str, Any] = {"network": NET, "config": CONFIG, "device": "cpu"}
    (folder / "next").mkdir()
    for place, steps in ((folder / "next", 4), (folder, 2)):
        api.train(
            IMAGE,
            STROKES,
            max_steps=steps,
            checkpoint=place,
            checkpoint_seconds=0,
            **ask,
        )


class _Log(logging.Handler):
    """Counts what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def checkpoint_save(folder: Path) -> None:
    """Keep the next checkpoint, the best so far; what a training logs is told."""
    log = _Log()
    logging.getLogger("napari_unetpp").addHandler(log)
    rolling = Rolling(folder)
    with rolling.alone():
        rolling.begin(resume=True)
        new = checkpoint.read(folder / "next" / rolling.path.name)
        history = new.history.copy()
        history[-1, 3] = 0.9
        rolling.keep(replace(new, history=history), wait=True)
    if rolling.lacks(4, retry=True):
        if not any("No checkpoint of step 4" in line for line in log.lines):
            raise AssertionError("nothing was said")
        raise SaveError(log.lines[-1])


def checkpoint_seen(folder: Path) -> tuple[str, ...]:
    """Return where a training goes on, and the best model."""
    rolling = Rolling(folder)
    found, best = rolling.begin(resume=True), rolling.best()
    assert found is not None
    tensors = found.state.tensors
    whole = digest(*(tensors[k] for k in sorted(tensors)))
    return f"{found.steps} {whole}", "none" if best is None else str(best.steps)


def note(number: int) -> tuple[recovery.Note, recovery.Packed]:
    """Return an annotation as it is kept."""
    return recovery.Note("0" * 32, "strokes"), recovery.pack(NOTES[number])


def autosave_old(folder: Path) -> None:
    """Save an annotation twice, so that both generations are there."""
    store = recovery.Store(folder)
    for _ in range(2):
        store.save(*note(0))
    store.close()


def autosave(folder: Path) -> None:
    """Save another annotation of that layer."""
    recovery.Store(folder).save(*note(1))


def autosave_seen(folder: Path) -> tuple[str, ...]:
    """Return what is offered after the session has ended."""
    offers, bad = recovery.Store(folder).offers()
    assert not bad
    return tuple(digest(recovery.read(offer.path)[1]) for offer in offers)


def autosave_again(folder: Path) -> None:
    """Save twice more: each of the two names is written."""
    store = recovery.Store(folder)
    for _ in range(2):
        store.save(*note(1))
    store.close()


def project_old(folder: Path) -> None:
    """Save a project of one image and one round."""
    api.save_project(folder, [IMAGE], [NOTES[0]], network(1))


def project_save(folder: Path) -> None:
    """Bring its annotation up to date."""
    api.save_project(folder, api.load_project(folder).images, [NOTES[1]])


def round_save(folder: Path) -> None:
    """Add a round."""
    api.add_round(folder, network(2), [NOTES[1]])


def rounds_old(folder: Path) -> None:
    """Save a project of two rounds, and strokes that no round keeps."""
    project_old(folder)
    round_save(folder)
    api.save_project(folder, api.load_project(folder).images, [NOTES[2]])


def project_seen(folder: Path) -> tuple[str, ...]:
    """Return annotations and models of all rounds."""
    found = api.load_project(folder)
    rounds = [weights(r.load_model()) for r in found.rounds]
    notes = [found.read_annotations(r.number) for r in found.rounds]
    notes.append(found.read_annotations())
    strokes = digest(*itertools.chain(*notes))
    return (f"{found.current} {rounds} {strokes}",)


def project_again(folder: Path) -> None:
    """Save the project as it is."""
    found = api.load_project(folder)
    api.save_project(folder, found.images, found.read_annotations())


def labels_with(seed: int) -> Callable[[Path], None]:
    """Return a saver of labels by the model of this seed."""

    def save(folder: Path) -> None:
        images = folder / "images"
        if not images.exists():
            images.mkdir()
            for n in range(2):
                tifffile.imwrite(images / f"{n}.tif", scene(n)[0])
        targets = api.plan_files(images, folder / "out")
        for step in api.predict_files(
            network(seed), targets, overwrite=True, device="cpu"
        ):
            if step.error is not None:
                raise step.error

    return save


def labels_seen(folder: Path) -> tuple[str, ...]:
    """Return what a reader finds in each label file."""
    return tuple(digest(io.read_labels(folder / "out" / f"{n}.tif")) for n in range(2))


LARGE = np.random.default_rng(0).integers(0, 255, (40, 520)).astype(np.uint8)


def zarr_with(seed: int) -> Callable[[Path], None]:
    """Return a saver of large labels by the model of this seed."""

    def save(folder: Path) -> None:
        api.predict_to_zarr(
            network(seed), LARGE, folder / "l.zarr", tile=256, overwrite=True,
            device="cpu",
        )  # fmt: skip

    return save


def zarr_seen(folder: Path) -> tuple[str, ...]:
    """Return what a reader finds, also between two renames of a folder."""
    import zarr

    path = folder / "l.zarr"
    if not path.exists():
        kept = folder / "l.zarr.part"
        assert (kept / "old.zarr").exists()
        assert (kept / "labels.zarr").exists()
        path = kept / "labels.zarr"
    group = zarr.open_group(path, mode="r")
    return (digest(group["0"][:], group["1"][:]),)


def run_to(steps: int, stop: int | None = None) -> Callable[[Path], None]:
    """Return a saver of a run of so many steps."""

    def save(folder: Path) -> None:
        ended = (folder / "scores.json").exists()
        if ended and not Rolling(folder).exists():
            with contextlib.suppress(SaveError), record.open_folder(folder, True):
                return
            return
        parts = {
            kind: api.Part([kind], [scene(n)[0]], [(scene(n)[1] > 1).astype(np.uint8)])
            for n, kind in enumerate(("train", "validation", "test"))
        }
        plan = api.Plan(NET, CONFIG, classes=("ground", "square"), max_steps=steps)
        training = api.run_steps(
            parts, folder, plan, device="cpu", resume=True, checkpoint_seconds=0
        )
        for step in training:
            if step.step == stop:
                training.close()

    return save


def run_seen(folder: Path) -> tuple[str, ...]:
    """Read everything in the run's folder; return its model."""
    for name in ("config", "environment", "scores"):
        with contextlib.suppress(FileNotFoundError):
            json.loads((folder / f"{name}.json").read_text())
    with contextlib.suppress(FileNotFoundError):
        assert (folder / "report.html").read_text().rstrip().endswith("</html>")
        assert (folder / "history.csv").read_bytes().endswith(b"\n")
    for picture in folder.rglob("*.png"):
        with PIL.Image.open(picture) as image:
            image.load()
    if Rolling(folder).exists():
        Rolling(folder).begin(resume=True)
    if not (folder / FILE.replace("m.", "model.")).exists():
        assert Rolling(folder).exists()  # there is something to go on with
        return ("none",)
    return (weights(api.load_model(folder / "model.safetensors")),)


SAVERS = {
    "model": Saver(
        lambda f: network(1).save(f / FILE),
        lambda f: network(2).save(f / FILE, overwrite=True),
        model_seen,
    ),
    "checkpoint": Saver(checkpoint_old, checkpoint_save, checkpoint_seen),
    "autosave": Saver(autosave_old, autosave, autosave_seen, autosave_again),
    "project": Saver(project_old, project_save, project_seen, project_again),
    "round": Saver(project_old, round_save, project_seen, project_again),
    "go back": Saver(
        rounds_old, lambda f: api.go_back(f, 1) and None, project_seen, project_again
    ),
    "labels": Saver(labels_with(1), labels_with(2), labels_seen),
    "big image": Saver(zarr_with(1), zarr_with(2), zarr_seen, goes_on=True),
    "run": Saver(run_to(4, stop=2), run_to(4), run_seen),
    "in place": Saver(
        lambda f: network(1).save(f / FILE), in_place, model_seen, control=True
    ),
    "careless": Saver(
        lambda f: network(1).save(f / FILE), careless, model_seen, control=True
    ),
}  # fmt: skip


# --- a child that is watched ------------------------------------------------------


class Child:
    """A fork of this process, which does some work once it is let go.

    Its answer goes through a socket: calls to `write` are those of its work.
    """

    def __init__(
        self, work: Callable[..., Any], *args: Any, trace: Sequence[str] = ()
    ) -> None:
        self._socket, other = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            _work(other, work, args)
        other.close()
        self._tracer = None
        if trace:
            command = ["strace", "-f", "-p", str(self.pid), *trace]
            self._tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            assert self._tracer.stderr is not None
            said = self._tracer.stderr.readline()
            if "attached" not in said:
                os.kill(self.pid, signal.SIGKILL)
                raise SystemExit(f"strace cannot watch: {said}")

    def go(self) -> None:
        """Let it begin."""
        self._socket.sendall(b"1")

    def end(self) -> tuple[int, Any]:
        """Wait for it; return 0 and its result, or how it ended and what it said."""
        data = b""
        with (
            contextlib.suppress(ConnectionResetError),
            self._socket.makefile("rb") as file,
        ):
            data = file.read()
        self._socket.close()
        _, status = os.waitpid(self.pid, 0)
        if self._tracer is not None:
            self._tracer.communicate()
        code = os.waitstatus_to_exitcode(status)
        return code, pickle.loads(data) if data else None


def _work(answer: socket.socket, work: Callable[..., Any], args: Any) -> None:
    code, told = FAULT, None
    try:
        answer.recv(1)
        told = work(*args)
        code = 0
    except UnetppError as error:
        code, told = TOLD, str(error)
    except OSError:
        code, told = UNTYPED, traceback.format_exc()[-900:]
    except BaseException:  # noqa: BLE001  # the parent is told, whatever it was
        told = traceback.format_exc()[-200:]
    finally:
        answer.sendall(pickle.dumps(told))
        os._exit(code)


def forked(
    work: Callable[..., Any], *args: Any, trace: Sequence[str] = (), after: float = -1
) -> tuple[int, Any]:
    """Do some work in a fork, under strace or killed after some seconds."""
    child = Child(work, *args, trace=trace)
    child.go()
    if after >= 0:
        time.sleep(after)
        os.kill(child.pid, signal.SIGKILL)
    return child.end()


def points(save: Callable[[Path], Any], folder: Path) -> list[tuple[str, int]]:
    """Save once; return the calls that write into the folder, with their numbers."""
    with tempfile.NamedTemporaryFile("r") as log:
        calls = ",".join(f"?{call}" for call in CALLS)
        options = ("-y", "-o", log.name, "-e", f"trace={calls}")
        code, told = forked(save, folder, trace=options)
        if code:
            raise SystemExit(f"the save fails by itself: {told}")
        counts: Counter[tuple[str, str]] = Counter()
        found = {}
        for line in log:
            parts = re.match(r"(\d+) +(\w+)\((.*)", line)
            if parts:
                thread, call, rest = parts.groups()
                counts[thread, call] += 1  # strace counts for each thread by itself
                if str(folder) in rest and ("open" not in call or "O_CREAT" in rest):
                    found[call, counts[thread, call]] = True
    return list(found)


def reached(log: str, folder: Path) -> bool:
    """Return whether the call that was broken is one on this folder."""
    last: dict[str, str] = {}
    for line in log.splitlines():
        thread, _, rest = line.partition(" ")
        if "killed by SIGKILL" in rest or "(INJECTED)" in rest:
            return str(folder) in rest or str(folder) in last.get(thread, "")
        last[thread] = rest
    return False


def temporary(folder: Path, saver: Saver, *, late: bool) -> list[str]:
    """Return what should not be there any more."""
    found = [
        path.name
        for path in folder.rglob("*")
        if path.name.endswith((".part", ".partial"))
        or (path.name.startswith(".") and path.name.endswith(".lock"))
    ]
    if saver.goes_on and not late:
        return []
    if late and (folder / "project.json").exists():
        project = api.load_project(folder)
        named = {i.annotation for i in project.images}
        kept = {f"{r.number:03d}" for r in project.rounds}
        found += [p.name for p in (folder / "annotations").iterdir()
                  if p.name not in named]  # fmt: skip
        found += [p.name for p in (folder / "rounds").iterdir() if p.name not in kept]
    return found


class Places:
    """Copies of one folder."""

    def __init__(self, where: Path, old: Callable[[Path], None]) -> None:
        self._where = where
        self._template = where / "old"
        self._template.mkdir()
        code, told = forked(old, self._template)
        if code:
            raise SystemExit(f"nothing can be prepared: {told}")
        self._n = 0

    @contextlib.contextmanager
    def copy(self) -> Iterator[Path]:
        """Hand out a copy and remove it."""
        self._n += 1
        path = self._where / f"{self._n:06d}"
        shutil.copytree(self._template, path)
        yield path
        shutil.rmtree(path, ignore_errors=True)


def break_calls(
    name: str, faults: Sequence[str], where: Path, only: str | None = None
) -> Counter[str]:
    """Break a saver at each of its calls, by each fault; return what was counted."""
    saver = SAVERS[name]
    places = Places(where, saver.old)
    with places.copy() as folder:
        old = forked(saver.seen, folder)[1]
        found = points(saver.save, folder)
        if only:
            found = [point for point in found if point[0] in only.split(",")]
        new = forked(saver.seen, folder)[1]
    if old == new or not isinstance(new, tuple):
        raise SystemExit(f"{name}: {old} became {new}")
    count: Counter[str] = Counter(calls=len(found))
    for (call, k), fault in itertools.product(found, faults):
        kind = "signal=SIGKILL" if fault == "SIGKILL" else f"error={fault}"
        where_ = f"{name}, {fault} at {call} {k}"
        with places.copy() as folder, tempfile.NamedTemporaryFile("r") as log:
            trace = ("-y", "-o", log.name, "-e", f"trace={call}")
            trace += ("-e", f"inject={call}:{kind}:when={k}")
            code, told = forked(saver.save, folder, trace=trace)
            count["points"] += 1
            if not reached(log.read(), folder):  # threads take turns as they like
                count["elsewhere"] += 1
                continue
            bad = judge(saver, folder, code, told, call, old, new, count)
            if code == KILLED:
                count["left by kills"] += bool(temporary(folder, saver, late=False))
            code, told = forked(saver.again or saver.save, folder)
            state = forked(saver.seen, folder)[1]
            left = temporary(folder, saver, late=True) if not code else []
            if code or not whole(state, new, new if saver.again is None else old):
                bad.append(f"next start: {code} {told} {state}")
            if left:
                bad.append(f"next start leaves {left}")
            for line in () if saver.control else bad:
                print(f"    {where_}: {line}", flush=True)
            count["wrong"] += bool(bad)
    return count


def whole(state: Any, new: tuple[str, ...], old: tuple[str, ...]) -> bool:
    """Return whether each part of what is seen is the old or the new one."""
    return (
        isinstance(state, tuple)
        and len(state) == len(new)
        and all(s in pair for s, *pair in zip(state, new, old, strict=True))
    )


def judge(
    saver: Saver,
    folder: Path,
    code: int,
    told: Any,
    call: str,
    old: tuple[str, ...],
    new: tuple[str, ...],
    count: Counter[str],
) -> list[str]:
    """Return what is wrong after a save that was broken."""
    bad = []
    state_code, state = forked(saver.seen, folder)
    if state_code or not whole(state, new, old):
        bad.append(f"torn or missing: {state}")
    else:
        count["new" if state == new else "old" if state == old else "mixed"] += 1
    if code == KILLED:
        count["killed"] += 1
        return bad
    count["told" if code else "saved"] += 1
    if not code and state != new:
        bad.append("said to be saved, but it is not")
    if code == UNTYPED:
        count["an OSError"] += 1
        if saver is not SAVERS["autosave"]:  # whose only caller catches it
            bad.append(f"not an error of ours: {told}")
    if code not in (0, TOLD, UNTYPED):
        bad.append(f"ended with {code}: {told}")
    left = temporary(folder, saver, late=False)
    if left and call not in TIDYING:
        bad.append(f"left behind: {left}")
    return bad


# --- kills at random moments ------------------------------------------------------


def kill_often(count: int, seed: int, where: Path) -> Counter[str]:
    """Kill saves of 1, 50 and 500 MB at random moments."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    shares = {1: 0.68, 50: 0.30, 500: 0.02}
    config = network(0).contents().config
    for megabytes, share in shares.items():
        folder = where / str(megabytes)
        folder.mkdir()
        path = folder / FILE
        rows = np.arange(megabytes * 250_000, dtype=np.float32)
        whole_ = [{"rows": (rows + n).reshape(250, -1)} for n in range(2)]

        def save(n: int, path: Path = path, whole_: Any = whole_) -> None:
            modelfile.write(
                path, whole_[n], config=config, provenance={}, overwrite=True
            )

        def seen(path: Path = path) -> int:
            return int(modelfile.read(path).tensors["rows"][0, 0])

        forked(save, 0)
        began = time.perf_counter()
        forked(save, 0)
        takes = time.perf_counter() - began
        for n in range(round(count * share)):
            code, told = forked(save, n % 2, after=rng.uniform(0, 1.1 * takes))
            state = forked(seen)
            found[f"{megabytes} MB"] += 1
            found["killed"] += code == KILLED
            found["left by kills"] += any(folder.glob(".*.part"))
            if state[0] or state[1] not in (0, 1) or code not in (0, KILLED):
                found["wrong"] += 1
                print(f"    {megabytes} MB: {code} {told} {state}", flush=True)
        forked(save, 1)
        if [p.name for p in folder.iterdir()] != [FILE] or forked(seen) != (0, 1):
            found["wrong"] += 1
            print(f"    {megabytes} MB: not tidied: {list(folder.iterdir())}")
    return found


# --- places where nothing can be written ------------------------------------------


def inputs(where: Path) -> None:
    """Write images, masks and a model, which no operation may change."""
    for kind in ("images", "masks"):
        (where / kind).mkdir()
    for n in range(6):
        image, strokes = scene(n)
        tifffile.imwrite(where / "images" / f"{n}.tif", image)
        io.write_labels(where / "masks" / f"{n}.tif", (strokes > 1).astype(np.uint8))
    tifffile.imwrite(where / "large.tif", LARGE)
    io.write_labels(where / "strokes.tif", STROKES)
    network(1).save(where / FILE)
    (where / "spare").mkdir()


def commands(where: Path, place: Path, steps: int = 2) -> dict[str, list[str]]:
    """Return the operations by name, as a user gives them."""
    image, spare = where / "images" / "0.tif", where / "spare"
    train = ["train", image, where / "strokes.tif", "--overwrite"]
    small = ["--network", "unet", "--width", 4, "--levels", 2, "--from-scratch"]
    learn = [*small, "--steps", steps, "--device", "cpu"]
    predict = ["predict", where / FILE]
    found: dict[str, list[Any]] = {
        "save model": [*train, *learn, "-o", place / FILE,
                       "--checkpoint", spare / "c.safetensors"],
        "checkpoint": [*train, *learn, "-o", spare / FILE, "--resume",
                       "--checkpoint", place / "c.safetensors",
                       "--checkpoint-seconds", 0],
        "project": ["train", "--project", place / "project", "--steps", steps],
        "predict": [*predict, where / "images", "-o", place / "out", "--overwrite"],
        "big image": [*predict, where / "large.tif", "-o", place / "l.zarr",
                      "--overwrite", "--tile", 256],
        "run": ["train", where / "images", where / "masks", *learn, "--resume",
                "--run", place / "run", "--checkpoint-seconds", 0,
                "--set", "score_every=2"],
        "demo": ["demo", "--sample", "coins", "--network", "unet", "--from-scratch",
                 "--steps", 1, "--out", place / "demo", "--overwrite"],
    }  # fmt: skip
    return {name: [str(word) for word in words] for name, words in found.items()}


def by_command(words: list[str]) -> tuple[int, str]:
    """Run a command; return its code and what it said."""
    said = buffers.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = command_line(words)
    return code, said.getvalue()


def operate(name: str, where: Path, place: Path, steps: int) -> tuple[int, str]:
    """Do one of the operations."""
    if name == "autosave":
        store = recovery.Store(place / "autosave")
        try:
            store.save(*note(steps % 2))
        except (UnetppError, OSError) as error:  # as the dock does, which shows it
            return 4, f"error: {error}"
        store.close()
        return 0, ""
    return by_command(commands(where, place, steps)[name])


def begin_operation(name: str, where: Path, place: Path) -> None:
    """Make what stands there before: results, or something that did not end."""
    if name == "project":
        api.save_project(
            place / "project", [where / "images" / "0.tif"], [STROKES], network(1)
        )
    elif name == "checkpoint":
        words = commands(where, place)[name]
        words[words.index("--overwrite")] = "-q"
        stop_at(3, words)
    elif name == "run":
        stop_at(3, commands(where, place, 6)[name])
    else:
        operate(name, where, place, 1)


def stop_at(step: int, words: list[str]) -> None:
    """Give a command, and Ctrl-C at a step."""
    from napari_unetpp.trainer import Trainer

    real = Trainer.step

    def stopping(self: Trainer) -> float:
        if self.steps == step - 1:
            signal.raise_signal(signal.SIGINT)
        return real(self)

    Trainer.step = stopping  # type: ignore[method-assign]
    words[words.index("--steps") + 1] = "6"
    code, said = by_command(words)
    assert code == 130, said


def contents(place: Path) -> dict[str, str]:
    """Return what tells the files of a folder from others."""
    return {
        str(path.relative_to(place)): digest(np.fromfile(path, np.uint8))
        for path in sorted(place.rglob("*"))
        if path.is_file() and not path.name.endswith((".lock", "lock", ".part"))
    }


def without_rights() -> None:
    """Let root obey the rights of files."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(head, data) == 0
    for n in range(2):
        data[n] &= ~0b10  # CAP_DAC_OVERRIDE
    assert libc.capset(head, data) == 0


def removing(place: Path) -> None:
    """Remove the folder at the moment when the first file is written there."""
    gone = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not gone and isinstance(args[0], (str, Path)):
            path = str(args[0])
            if path.startswith(str(place)) and path.endswith((".part", ".partial")):
                gone.append(path)
                shutil.rmtree(place)

    sys.addaudithook(hook)


EVERY_WRITE = "write,pwrite64,writev,fsync,fdatasync,mkdir,rename"


def spoil(kind: str, mount: Path, place: Path) -> None:
    """Make a place as one meets it."""
    if kind == "disk full":
        with contextlib.suppress(OSError), open(mount / "filler", "wb", 0) as file:
            while True:
                file.write(bytes(4096))
    elif kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    elif kind == "no permission":
        subprocess.run(["chmod", "-R", "a-w", str(place)], check=True)


def mend(mount: Path, place: Path) -> None:
    """Undo it."""
    subprocess.run(["mount", "-o", "remount,rw", str(mount)], check=True)
    (mount / "filler").unlink(missing_ok=True)
    if place.exists():
        subprocess.run(["chmod", "-R", "u+w", str(place)], check=True)


PLACES = ("disk full", "read-only", "no permission", "deleted meanwhile", "share gone")
OPERATIONS = (
    "save model", "checkpoint", "autosave", "project", "predict", "big image", "run",
    "demo",
)  # fmt: skip


def spoil_places(where: Path) -> Counter[str]:
    """Do every operation in every place; return what was counted."""
    inputs(where)
    mount, place = where / "disk", where / "disk" / "place"
    mount.mkdir()
    given = contents(where)
    count: Counter[str] = Counter()
    for kind, name in itertools.product(PLACES, OPERATIONS):
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(mount)], check=True
        )
        try:
            bad = spoil_one(kind, name, where, mount, place)
        finally:
            subprocess.run(["umount", "-l", str(mount)], check=True)
        shutil.rmtree(where / "spare")
        (where / "spare").mkdir()
        if contents(where) != given:
            bad.append("an input has changed")
        count["points"] += 1
        count["wrong"] += bool(bad)
        for line in bad:
            print(f"    {name}, {kind}: {line}", flush=True)
    return count


def spoil_one(kind: str, name: str, where: Path, mount: Path, place: Path) -> list[str]:
    """Return what is wrong with one operation in one place."""
    place.mkdir()
    (place / "autosave").mkdir()
    code, told = forked(begin_operation, name, where, place)
    if code:
        return [f"cannot be prepared: {told}"]
    before = contents(place)
    spoil(kind, mount, place)

    def work() -> tuple[int, str]:
        if kind == "no permission":
            without_rights()
        if kind == "deleted meanwhile":
            removing(place)
        return operate(name, where, place, 6)

    trace: tuple[str, ...] = ()
    if kind == "share gone":
        trace = ("-o", os.devnull, "-e", f"trace={EVERY_WRITE}")
        trace += ("-e", f"inject={EVERY_WRITE}:error=EIO:when=1+")
    code, told = forked(work, trace=trace)
    if code:
        return [f"a fault: {told}"]
    bad = []
    code, said = told
    after = contents(place) if place.exists() else {}
    print(f"  {name}, {kind}: exit {code}: {said.strip()[-240:]!r}", flush=True)
    if name == "checkpoint":  # which does not end a training: the log says it
        if code not in (0, 4) or ("No checkpoint" not in said and "error" not in said):
            bad.append(f"exit {code}: {said}")
        if not code and not (where / "spare" / FILE).exists():
            bad.append("no model")
    elif code != 4 or "error: " not in said:
        bad.append(f"exit {code}: {said}")
    if (
        code
        and kind != "deleted meanwhile"
        and {k: after.get(k) for k in before} != before
    ):
        bad.append(f"old data have changed: {sorted(before.items() - after.items())}")
    parts = [p.name for p in place.rglob(".*.part")] if place.exists() else []
    if parts and kind != "share gone":
        bad.append(f"left behind: {parts}")
    mend(mount, place)
    if kind == "deleted meanwhile":
        shutil.rmtree(place, ignore_errors=True)
        (place / "autosave").mkdir(parents=True)
        if name == "project":
            forked(begin_operation, name, where, place)
    code, told = forked(operate, name, where, place, 6)
    if code or told[0]:
        bad.append(f"not usable afterwards: {told}")
    return bad


# --- two at once ------------------------------------------------------------------

REFUSED = re.compile("(written|finished) by another|holds a run that has ended")


def pair_up(count: int, seed: int, where: Path) -> Counter[str]:
    """Start two of everything on one folder; return what was counted."""
    inputs(where)
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    alone: dict[str, set[Any]] = {}
    for n in range(count):
        kind = list(PAIRS)[n % len(PAIRS)]
        one, other, seen = PAIRS[kind]
        orders = ((one,), (other,), (one, other), (other, one))
        if kind not in alone:
            alone[kind] = {_one_by_one(where, kind, order) for order in orders}
        place = fresh(where, kind)
        pair = [Child(work, where, place) for work in (one, other)]
        rng.shuffle(pair)
        for child in pair:
            child.go()
            time.sleep(rng.uniform(0, 0.05))
        ends = [child.end() for child in pair]
        refused = [end for end in ends if end[0]]
        state = forked(seen, place)
        found["pairs"] += 1
        found["second refused" if refused else "one after the other"] += 1
        bad = [e for e in refused if e[0] != TOLD or not REFUSED.search(str(e[1]))]
        if len(refused) > 1 or bad or state[0] or state[1] not in alone[kind]:
            found["wrong"] += 1
            print(f"    {kind}: {ends} {state} {alone[kind]}", flush=True)
    return found


def _one_by_one(where: Path, kind: str, order: Sequence[Callable[..., None]]) -> Any:
    place = fresh(where, kind)
    for work in order:
        forked(work, where, place)
    return forked(PAIRS[kind][2], place)[1]


def fresh(where: Path, kind: str) -> Path:
    """Return a new place for a pair."""
    place = where / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if "project" in kind:
        forked(begin_operation, "project", where, place)
    return place


def command_of(name: str) -> Callable[[Path, Path], None]:
    """Return a command as work for a child."""

    def work(where: Path, place: Path) -> None:
        code, said = by_command(commands(where, place, 20)[name])
        if code:
            raise SaveError(said) if code == 4 else AssertionError(f"{code}: {said}")

    return work


def window_predicts(where: Path, place: Path) -> None:
    """Label a folder by what the dock calls."""
    targets = api.plan_files(where / "images", place / "out")
    model = api.load_model(where / FILE)
    for step in api.predict_files(model, targets, overwrite=True):
        if step.error is not None:
            raise step.error


def script_trains(_: Path, place: Path) -> None:
    """Go on with the one checkpoint."""
    api.train(
        IMAGE, STROKES, network=NET, config=CONFIG, max_steps=20, device="cpu",
        checkpoint=place, checkpoint_seconds=0, resume=True,
    )  # fmt: skip


def window_adds(seed: int) -> Callable[[Path, Path], None]:
    """Return what the dock calls to add a round."""
    return lambda _, place: api.add_round(place / "project", network(seed)) and None


PAIRS: dict[str, tuple[Callable[..., Any], ...]] = {
    "two commands predict": (
        command_of("predict"), command_of("predict"),
        lambda place: str(contents(place / "out")),
    ),
    "window and command predict": (
        window_predicts, command_of("predict"),
        lambda place: str(contents(place / "out")),
    ),
    "two big images": (
        command_of("big image"), command_of("big image"), zarr_seen,
    ),
    "two commands train": (
        command_of("save model"), command_of("save model"), model_seen,
    ),
    "two scripts, one checkpoint": (script_trains, script_trains, checkpoint_seen),
    "two runs": (
        command_of("run"), command_of("run"), lambda place: run_seen(place / "run"),
    ),
    "two windows, one project": (
        window_adds(2), window_adds(3), lambda place: project_seen(place / "project"),
    ),
}  # fmt: skip


def main() -> int:
    """Run one of the modes and print its counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["calls", "kills", "places", "pairs"])
    parser.add_argument("--savers", default=",".join(SAVERS), help="of calls")
    parser.add_argument("--faults", default=",".join(("SIGKILL", *ERRORS)))
    parser.add_argument("--calls", help="only these of the system calls")
    parser.add_argument("--count", type=int, help="of kills (1,000) or pairs (50)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads cannot be forked
    logging.getLogger("napari_unetpp").addHandler(logging.NullHandler())
    for seed in range(4):
        network(seed)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        where = Path(os.path.realpath(folder))
        if options.mode == "calls":
            for name in options.savers.split(","):
                (where / name).mkdir()
                faults = options.faults.split(",")
                found = break_calls(name, faults, where / name, options.calls)
                print(f"{name}: {dict(found)}", flush=True)
                wrong += bool(found["wrong"]) != SAVERS[name].control
            return int(wrong > 0)
        if options.mode == "kills":
            found = kill_often(options.count or 1000, options.seed, where)
        elif options.mode == "places":
            found = spoil_places(where)
        else:
            found = pair_up(options.count or 50, options.seed, where)
    print(dict(found))
    return int(found["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
