"""Quality against annotation time, ours against a random forest, without a human.

    python benchmarks/annotator.py --data ../shared/data
    python benchmarks/annotator.py --print benchmarks/annotator.jsonl
    python benchmarks/annotator.py --print FILE --plot curves.png --picture strokes.png

A simulated person (person.py) starts with nothing, paints a stroke of each class, then
looks at what a method shows and paints where it is wrong. "forest@unet++" learns from
the strokes that were painted for "unet++", as they came; "dense-unet++" from the whole
truth of the same images for `--whole` seconds, which is the bar for the others.

The forest is fitted after each stroke in no time. A network goes on learning while the
person looks and paints, as a live training does, but for the part of the time in which
that predicts the view; a step counts as `--ms`. Every run appends one line of JSON, so
that a broken off benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import curves
import numpy as np
import strokes as protocol
import tifffile
import torch
from numpy.typing import NDArray
from person import LOOK, Person, Stroke
from sklearn.ensemble import RandomForestClassifier

from napari_unetpp import api
from napari_unetpp.config import TrainConfig
from napari_unetpp.examples import ExampleBook
from napari_unetpp.live.session import missing
from napari_unetpp.train import starting_model
from napari_unetpp.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

# Which of the protocol's training images are annotated: a large one, or two small ones.
TASKS = {
    "isbi2012_em": (0,),
    "dsb2018": (0, 2),
    "glas": (0, 2),
    "wbc": (0, 1),
    "ctc_dic_hela": (0,),
    "usiigaci_phc": (0,),
    "fluo_nuclei": (0,),
}
METHODS = "unet++,forest,forest@unet++,dense-unet++,unet++-scratch,unet,fcn-8s"
TIMES = (5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0)
STEP_MS = {"unet++": 46.0, "unet": 40.0, "fcn-8s": 70.0}
# A view of 512 px takes 190, 60 and 115 ms at those steps, and is predicted anew after
# 350 ms of training while strokes are new, as `live.session` shares the time.
SHOWING = {"unet++": 0.35, "unet": 0.15, "fcn-8s": 0.25}


@dataclass
class Work(protocol.Task):
    """A task whose annotated images have truths, too."""

    dense: list[NDArray[np.uint8]]

    def scores(self, learner: Live | Forest) -> dict[str, list[float]]:
        """Return the protocol's IoU, of the deepest head first, on either images."""
        judged = {"seen": replace(self, truths=self.dense), "unseen": self}
        found: dict[str, list[float]] = {part: [] for part in judged}
        for part, task in judged.items():
            for depth in (None, *learner.depths):
                labels = learner.labels(seen=part == "seen", depth=depth)
                score = protocol.score(task, labels)["foreground"] if labels else 0.0
                found[part].append(score)
        return found


def load_work(data: Path, name: str) -> Work:
    """Read the annotated images and about a million pixels of others."""
    task = protocol.load_task(data, name)
    names = sorted(p.stem for p in (data / name / "scribbles").glob("*.tif"))
    names = list(protocol.NUCLEI) if name == "dsb2018" else names
    dense = [tifffile.imread(data / name / "semantic" / f"{n}.tif") for n in names[:3]]
    if rim := protocol.RIM.get(name):
        dense = [np.pad(t[rim:-rim, rim:-rim], rim) for t in dense]
    n = int(np.clip(1e6 / np.median([t.size for t in task.truths]), 2, 24))
    kept = np.unique(np.linspace(0, len(task.tests) - 1, n).astype(int))
    mine = TASKS[name]
    return Work(
        name,
        [task.images[i] for i in mine],
        [task.strokes[i] for i in mine],
        [task.tests[i] for i in kept],
        [task.truths[i] for i in kept],
        [dense[i] for i in mine],
    )


class Live:
    """A network that learns as in `napari_unetpp.live.session`."""

    def __init__(self, work: Work, method: str, seed: int, ms: float | None) -> None:
        self._work, self._seed, self._method = work, seed, method
        self._network = method.removesuffix("-scratch")
        self._seconds = (ms or STEP_MS[self._network]) / 1000
        self._book = ExampleBook(work.images, [work.channel_axis] * len(work.images))
        self._trainer: Trainer | None = None
        self._owed = 0.0  # s of training
        self.depths = (1, 2, 3) if method == "unet++" else ()

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self._trainer.steps if self._trainer else 0

    def take(self, targets: list[NDArray[np.uint8]]) -> None:
        """Take over strokes, as the session does."""
        wished = tuple({0: t} if t.any() else {} for t in targets)
        classes = tuple(str(k + 1) for k in range(self._work.n_classes))
        if self._trainer is not None:
            self._trainer.learn_from(self._book.read(wished))
        elif not missing(wished, classes, fresh=True):
            examples = self._book.read(wished)
            start = starting_model(
                None,
                self._network,
                classes,
                len(examples.images[0]),
                0,
                self._seed,
                pretrained=self._network == self._method,
            )
            self._trainer = Trainer(
                start,
                examples,
                TrainConfig(),
                seed=self._seed,
                device=torch.device("cpu"),
            )

    def wait(self, seconds: float) -> None:
        """Train in the part of the time that predictions leave."""
        self.train(seconds * (1 - SHOWING[self._network]))

    def train(self, seconds: float) -> None:
        """Take the steps of so many seconds."""
        if self._trainer is not None:
            self._owed += seconds
            while self._owed >= self._seconds:
                self._trainer.step()
                self._owed -= self._seconds

    def labels(self, *, seen: bool, depth: int | None = None) -> Any:
        """Return what the averaged model shows; None: nothing yet."""
        if self._trainer is None:
            return None
        model, axis = self._trainer.model(), self._work.channel_axis
        images = self._work.images if seen else self._work.tests
        return [api.predict(model, i, channel_axis=axis, depth=depth) for i in images]


class Forest:
    """The protocol's forest, fitted anew to all strokes before it is looked at."""

    depths: tuple[int, ...] = ()
    steps = 0

    def __init__(self, work: Work, seed: int) -> None:
        self._seed, self._n_classes = seed, work.n_classes
        self._forest: RandomForestClassifier | None = None
        self._targets = work.dense[:0]
        self._features = {
            seen: [protocol.features(i, work.channel_axis, scaled=True) for i in images]
            for seen, images in ((True, work.images), (False, work.tests))
        }

    def take(self, targets: list[NDArray[np.uint8]]) -> None:
        """Take over strokes."""
        self._targets, self._forest = targets, None

    def wait(self, seconds: float) -> None:
        """Do nothing."""

    def labels(self, *, seen: bool, depth: None = None) -> Any:  # noqa: ARG002
        """Return what the forest, which has no depths, shows; None: nothing yet."""
        y = np.concatenate([t[t > 0] for t in self._targets] or [np.zeros(0)])
        if len(np.unique(y)) < self._n_classes:
            return None
        if self._forest is None:
            pairs = zip(self._features[True], self._targets, strict=True)
            self._forest = RandomForestClassifier(
                100,
                class_weight="balanced",
                random_state=self._seed,
                **protocol.FORESTS[0],
            ).fit(np.concatenate([f[t > 0] for f, t in pairs]), y)
        return [
            self._forest.predict(f.reshape(-1, f.shape[-1])).reshape(f.shape[:2])
            for f in self._features[seen]
        ]


def annotate(
    work: Work,
    learner: Live | Forest,
    seconds: float,
    paint: Callable[[Callable[[], Any]], Stroke],
) -> dict[str, Any]:
    """Learn from one stroke after the other, and score what is shown on the way."""
    times = [t for t in TIMES if t <= seconds]
    targets = [np.zeros_like(t) for t in work.dense]
    now, rows, done = 0.0, [], []

    def wait(until: float) -> None:
        nonlocal now
        while times and times[0] <= until:
            learner.wait(times[0] - now)
            now = times.pop(0)
            row = {"time": now, "strokes": len(done), "steps": learner.steps}
            rows.append(row | work.scores(learner))
        if times:
            learner.wait(until - now)
            now = until

    while times:
        wait(now + LOOK)
        stroke = paint(lambda: learner.labels(seen=True))
        wait(now + stroke.seconds - LOOK)
        targets[stroke.image] = stroke.paint(targets[stroke.image])
        learner.take(list(targets))
        done.append(vars(stroke) | {"points": stroke.points.tolist()})
    return {"rows": rows, "strokes": done}


def run(
    work: Work, method: str, seed: int, args: Any, lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the scores of one method on one task, and its strokes."""
    if method.startswith("dense-"):
        whole = Live(work, method.removeprefix("dense-"), seed, args.ms)
        whole.take(work.dense)
        whole.train(args.whole)
        row = {"time": args.whole, "steps": whole.steps}
        return {"rows": [row | work.scores(whole)]}
    name, _, other = method.partition("@")
    learner = (
        Forest(work, seed) if name == "forest" else Live(work, name, seed, args.ms)
    )
    if not other:
        person = Person(work.dense, seed, args.speed)
        return annotate(work, learner, args.seconds, lambda show: person.next(show()))
    key = (work.name, other, seed)
    found = next(r for r in lines if (r["task"], r["method"], r["seed"]) == key)
    again = (Stroke(**s | {"points": np.array(s["points"])}) for s in found["strokes"])
    return annotate(work, learner, args.seconds, lambda _: next(again))


def main() -> None:
    """Run what is missing in the output file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/annotator.jsonl"))
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--tasks", default=",".join(list(TASKS)[:6]))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--speed", type=float, default=60.0, help="px/s on screen")
    parser.add_argument("--ms", type=float, help="milliseconds that a step counts")
    parser.add_argument("--whole", type=float, default=60.0, help="s of whole truth")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print", dest="only_print", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.only_print or args.out
    rows = out.read_text().splitlines() if out.exists() else []
    lines = [json.loads(row) for row in rows]
    done = {(r["task"], r["method"], r["seed"]) for r in lines}
    names, methods = args.tasks.split(","), args.methods.split(",")
    todo = [(s, m, t) for s in range(args.seeds) for m in methods for t in names]
    for seed, method, name in todo if args.only_print is None else []:
        if (name, method, seed) in done:
            continue
        found = run(load_work(args.data, name), method, seed, args, lines)
        lines.append({"task": name, "method": method, "seed": seed, **found})
        with out.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        shown = [[round(r[p][0], 3) for r in found["rows"]] for p in curves.PARTS]
        print(name, method, seed, *shown, flush=True)
    curves.print_table(lines)
    if args.plot:
        curves.plot(lines, args.plot)
    if args.picture:
        curves.picture(
            lines, lambda name: load_work(args.data, name).images[0], args.picture
        )


if __name__ == "__main__":
    main()
