"""A run as a page: one file, without scripts, every foreign text escaped."""

from __future__ import annotations

import base64
import html
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from napari_unetpp import io, pictures

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

visible = pictures.visible


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with its truth.

    Attributes
    ----------
    name : str
        Of the image.
    image : ndarray of shape (Y, X, 3) and dtype uint8
        As it is looked at.
    truth : ndarray of shape (Y, X) and dtype uint8
        1 = background, 2, 3, ... = classes, 0 = not judged.
    labels : ndarray of shape (Y, X) and dtype uint8, or None
        The model's, in the same coding.
    caption : str
        What it shows.
    """

    name: str
    image: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    labels: NDArray[np.uint8] | None = None
    caption: str = ""


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a report shows.

    Attributes
    ----------
    film : Scene
        The validation image that was looked at during the training.
    frames : Path
        Folder of its labels, ``step_NNNNNNNN.png``.
    examples : sequence of Scene
        Of the test.
    """

    film: Scene
    frames: Path
    examples: Sequence[Scene] = ()


def write(folder: Path, record: Mapping[str, Any], shown: Pictures) -> None:
    """Write curves.png, film.png, the examples and report.html.

    Parameters
    ----------
    folder : Path
        Of the run.
    record : mapping
        `config`, `environment`, `scores`, `history` (of TrainStep) and `stopped`.
    shown : Pictures
        What is shown beside figures.

    Raises
    ------
    SaveError
        If a file cannot be written.
    """
    files: dict[str, bytes] = {
        "curves.png": pictures.png(pictures.curves(record["history"]))
    }
    frames = _frames(record, shown)
    if frames:
        files["film.png"] = pictures.film(shown.film.image, shown.film.truth, frames)
    for i, scene in enumerate(shown.examples):
        if scene.labels is not None:
            tinted = pictures.compared(scene.image, scene.labels, scene.truth)
            for kind, pixels in (("image", scene.image), ("labels", tinted)):
                files[f"test_{i}_{kind}.png"] = pictures.png(pictures.sized(pixels))
    for name, data in files.items():
        io.atomic_write(folder / name, data, overwrite=True)
    page = _page(record, shown, files)
    io.write_text(folder / "report.html", page, overwrite=True)


def _frames(
    record: Mapping[str, Any], shown: Pictures
) -> list[tuple[int, float | None, NDArray[np.uint8]]]:
    """Return step, score and labels of each validation that left a picture."""
    scores = {s.step: s.score for s in record["history"] if s.score is not None}
    found = []
    add = int(record["config"]["unlabelled"] is None)
    for path in sorted(shown.frames.glob("step_*.png")):
        number = re.fullmatch(r"step_(\d{1,12})", path.stem)
        if number is None:
            continue
        labels = io.read_labels(path)
        if labels.shape == shown.film.truth.shape:
            step = int(number[1])
            found.append((step, scores.get(step), labels + labels.dtype.type(add)))
    return found


# --- the page --------------------------------------------------------------------

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#212529;background:#f5f6f8;margin:0}
main{max-width:1000px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:30px;margin:0;overflow-wrap:anywhere}
h2{font-size:19px;margin:36px 0 10px}
.sub{color:#5c6570;margin:4px 0 22px}
.tiles{display:flex;flex-wrap:wrap;gap:14px}
.tile{background:#fff;border:1px solid #e3e6ea;border-radius:10px;padding:12px 18px;
flex:1 1 150px}
.tile b{display:block;font-size:30px;line-height:1.2}
.tile.main{background:#0072b2;border-color:#0072b2;color:#fff}
.tile span{font-size:14px}
.card{background:#fff;border:1px solid #e3e6ea;border-radius:10px;padding:14px}
.row{display:flex;flex-wrap:wrap;gap:14px;align-items:flex-start}
img{max-width:100%;display:block;border-radius:4px}
.film{flex:1 1 300px;max-width:400px}
.film img{width:100%}
.pair{display:flex;gap:6px}
.pair img{width:calc(50% - 3px)}
.three .card{flex:1 1 280px;max-width:100%}
figcaption,.note{font-size:14px;color:#5c6570;margin-top:8px;overflow-wrap:anywhere}
figure{margin:0}
.key{display:inline-block;width:13px;height:13px;border-radius:3px;
vertical-align:-1px;margin:0 5px 0 14px}
.key:first-child,br+.key{margin-left:0}
table{border-collapse:collapse;background:#fff;font-size:14px}
td,th{border-bottom:1px solid #e3e6ea;padding:5px 14px 5px 0;text-align:left;
vertical-align:top;overflow-wrap:anywhere}
td.n{text-align:right;font-variant-numeric:tabular-nums}
details{background:#fff;border:1px solid #e3e6ea;border-radius:10px;
padding:10px 16px;margin-top:10px}
summary{cursor:pointer;font-weight:600}
""".strip()
_WORDS = (
    ("found", pictures.RIGHT),
    ("missed", pictures.MISSED),
    ("invented", pictures.INVENTED),
    ("another class", pictures.MIXED),
)


def _page(
    record: Mapping[str, Any], shown: Pictures, files: Mapping[str, bytes]
) -> str:
    config, scores = record["config"], record["scores"]
    words = _WORDS if len(config["classes"]) > 2 else _WORDS[:3]
    key = "".join(
        f'<span class="key" style="background:rgb{colour}"></span>{word}'
        for word, colour in words
    )
    parts = [
        f"<h1>{_e(config['title'])}</h1>",
        f'<p class="sub">{_e(_subtitle(record))}</p>',
        f'<div class="tiles">{"".join(_tiles(record))}</div>',
    ]
    if "film.png" in files:
        parts += [
            "<h2>How it learned</h2>",
            '<div class="row"><figure class="card film">',
            _image(files["film.png"], "the prediction, growing"),
            f"<figcaption>{_e(shown.film.name)}, of the validation images<br>"
            f"{key}</figcaption></figure>",
            '<figure class="card" style="flex:2 1 420px">',
            _image(files["curves.png"], "loss and validation score"),
            f"<figcaption>Validation: {_e(scores['measure'])}. The model of the best "
            "step is the one that was kept.</figcaption></figure></div>",
        ]
    else:
        parts += ["<h2>How it learned</h2>", '<div class="card">']
        parts += [_image(files["curves.png"], "loss and validation score"), "</div>"]
    if "test" in scores:
        parts += _tested(scores["test"], shown, files, key)
    parts += [
        "<h2>What it was made of</h2>",
        _details("Images", _images(config, scores)),
        _details("Network and training", _settings(config)),
        _details("Versions, device, seed", _environment(record["environment"])),
        _details("Fingerprints of the images", _prints(record["environment"]["data"])),
    ]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(config['title'])}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _subtitle(record: Mapping[str, Any]) -> str:
    config, scores = record["config"], record["scores"]
    told = (
        f"{config['network']['name']} with {scores['parameters']:,} weights, "
        f"{scores['steps']:,} steps in {_time(scores['seconds'])} on "
        f"{record['environment']['device']}"
    )
    return told + (
        ". Stopped before its end, so not tested." if record["stopped"] else ""
    )


def _tiles(record: Mapping[str, Any]) -> Iterable[str]:
    scores, parts = record["scores"], record["config"]["parts"]
    test = scores.get("test")
    if test is not None:
        yield _tile(_number(test["score"]), "IoU on the test, scored once", main=True)
    yield _tile(
        _number(scores["validation"]),
        "IoU of the best validation"
        + (f", step {scores['best_step']:,}" if scores["best_step"] else ""),
        main=test is None,
    )
    if test is not None:
        yield _tile(f"{100 * test['accuracy']:.1f} %", "test pixels right")
    sizes = " / ".join(str(len(names)) for names in parts.values())
    yield _tile(sizes, f"images: {' / '.join(parts)}")


def _tile(value: str, text: str, *, main: bool = False) -> str:
    kind = "tile main" if main else "tile"
    return f'<div class="{kind}"><b>{_e(value)}</b><span>{_e(text)}</span></div>'


def _tested(
    test: Mapping[str, Any], shown: Pictures, files: Mapping[str, bytes], key: str
) -> list[str]:
    cards = []
    for i, scene in enumerate(shown.examples):
        if f"test_{i}_labels.png" not in files:
            continue
        pair = "".join(
            _image(files[f"test_{i}_{kind}.png"], f"{kind} of {scene.name}")
            for kind in ("image", "labels")
        )
        cards.append(
            f'<figure class="card"><div class="pair">{pair}</div><figcaption>'
            f"{_e(scene.caption)}<br>{_e(scene.name)}</figcaption></figure>"
        )
    rows = [
        [name, _number(test["iou"][name]), _number(test["dice"][name])]
        for name in test["iou"]
    ]
    return [
        "<h2>On the test images</h2>",
        f'<p class="note">{key}</p>',
        f'<div class="row three">{"".join(cards)}</div>',
        '<div style="margin-top:14px" class="card">',
        _table(["all test images together", "IoU", "Dice"], rows),
        "</div>",
    ]


def _images(config: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    tested = scores.get("test", {}).get("images", {})
    rows = [
        [part, name, _number(tested[name]) if part == "test" and tested else ""]
        for part, names in config["parts"].items()
        for name in names
    ]
    return _table(["part", "image", "score"], rows)


def _settings(config: Mapping[str, Any]) -> str:
    rows = [
        [key, _value(value)]
        for table in (config["network"], config["training"])
        for key, value in table.items()
    ]
    rows += [[k, _value(config[k])] for k in ("classes", "max_steps", "max_seconds")]
    return _table(["setting", "value"], rows)


def _environment(values: Mapping[str, Any]) -> str:
    rows = [[key, _value(value)] for key, value in values.items() if key != "data"]
    return _table(["", ""], rows)


def _prints(data: Mapping[str, Mapping[str, str]]) -> str:
    rows = [[part, n, v] for part, prints in data.items() for n, v in prints.items()]
    return _table(["part", "image", "SHA-256, first 16"], rows)


def _details(title: str, content: str) -> str:
    return f"<details><summary>{_e(title)}</summary>{content}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{_e(text)}</th>" for text in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="n">{_e(v)}</td>' if _is_number(v) else f"<td>{_e(v)}</td>"
            for v in row
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _image(data: bytes, text: str) -> str:
    code = base64.b64encode(data).decode("ascii")
    return f'<img alt="{_e(text)}" src="data:image/png;base64,{code}">'


def _e(text: object) -> str:
    """Escape, and show what is not printable instead of obeying it."""
    plain = "".join(
        c
        if c.isprintable()
        else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)
    )
    return html.escape(plain, quote=True)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d\.\d+", text) is not None


def _number(value: float | None) -> str:
    return "none" if value is None or value != value else f"{value:.3f}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
