"""The pair table follows the viewer's layers and chooses what fits."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from napari.components import ViewerModel
from napari.utils._proxies import PublicOnlyProxy
from qtpy.QtCore import QPoint, QPointF, Qt
from qtpy.QtGui import QWheelEvent
from qtpy.QtWidgets import QApplication, QComboBox, QPushButton, QScrollArea

from napari_unetpp._widgets.pairs import Pair, PairTable, plain

if TYPE_CHECKING:
    from napari.layers import Image, Labels
    from pytestqt.qtbot import QtBot

LEFT = Qt.MouseButton.LeftButton


class Seen:
    """A pair table on screen, its parts, and what it told."""

    def __init__(self, qtbot: QtBot, viewer: Any) -> None:
        self.bot = qtbot
        self.viewer = viewer
        self.layers = viewer.layers
        self.widget = PairTable(viewer)
        qtbot.addWidget(self.widget)
        self.changed: list[list[Pair]] = []
        self.wanted: list[int] = []
        self.widget.changed.connect(lambda: self.changed.append(self.widget.pairs()))
        self.widget.annotation_wanted.connect(self.wanted.append)
        self.widget.resize(338, 120)
        self.widget.show()
        qtbot.waitExposed(self.widget)

    def image(self, name: str, *shape: int, **more: Any) -> Image:
        return self.viewer.add_image(np.zeros(shape or (8, 9)), name=name, **more)

    def labels(self, name: str, *shape: int, **more: Any) -> Labels:
        data = np.zeros(shape or (8, 9), np.uint8)
        return self.viewer.add_labels(data, name=name, **more)

    def combo(self, text: str) -> QComboBox:
        return self.control(QComboBox, text)

    def button(self, text: str) -> QPushButton:
        return self.control(QPushButton, text)

    def control(self, kind: type, text: str) -> Any:
        QApplication.processEvents()  # a new row appears, a removed one goes
        (found,) = [
            c for c in self.widget.findChildren(kind)
            if c.accessibleName() == text and c.isVisible()
        ]  # fmt: skip
        return found

    def choose(self, combo: QComboBox, text: str) -> None:
        """Choose as by keyboard: with the arrows, then Return."""
        combo.showPopup()
        view = combo.view()
        index = combo.model().index(combo.findText(text), 0)
        assert index.isValid()
        view.setCurrentIndex(index)
        self.bot.keyClick(view, Qt.Key.Key_Return)

    def press(self, text: str) -> None:
        self.bot.mouseClick(self.button(text), LEFT)

    def texts(self, combo: QComboBox) -> list[str]:
        return [combo.itemText(i) for i in range(combo.count())]


@pytest.fixture
def seen(qtbot: QtBot) -> Any:
    seen = Seen(qtbot, ViewerModel())
    yield seen
    seen.widget.close_events()


def test_without_layers_there_is_one_empty_row(seen: Seen) -> None:
    assert seen.widget.pairs() == []
    assert seen.combo("Image of pair 1").placeholderText() == "image…"
    assert not seen.button("New annotation for pair 1").isEnabled()


def test_the_first_image_and_an_annotation_of_its_shape_are_chosen(
    seen: Seen,
) -> None:
    seen.labels("too small", 4, 4)
    image = seen.image("cells")
    assert seen.widget.pairs() == [Pair((image,), None)]
    note = seen.labels("strokes")
    assert seen.widget.pairs() == [Pair((image,), note)]
    seen.image("second")
    seen.labels("other strokes")
    assert seen.widget.pairs() == [Pair((image,), note)]
    assert len(seen.changed) == 2


def test_a_painted_layer_is_offered_and_not_taken(seen: Seen) -> None:
    image = seen.image("cells")
    painted = seen.viewer.add_labels(np.ones((8, 9), np.uint8), name="painted")
    assert seen.widget.pairs() == [Pair((image,), None)]
    assert seen.widget.undecided()
    seen.choose(seen.combo("Annotation of pair 1"), "painted")
    assert seen.widget.pairs() == [Pair((image,), painted)]
    assert not seen.widget.undecided()


def test_layers_that_were_there_before_are_offered(qtbot: QtBot) -> None:
    viewer = ViewerModel()
    image = viewer.add_image(np.zeros((8, 9, 3), np.uint8), rgb=True)
    note = viewer.add_labels(np.zeros((8, 9), np.uint8))
    seen = Seen(qtbot, viewer)
    assert seen.widget.pairs() == [Pair((image,), note)]
    seen.widget.close_events()


def test_our_own_predictions_are_not_offered(seen: Seen) -> None:
    seen.image("cells")
    seen.labels("prediction", metadata={"napari-unetpp": {"kind": "prediction"}})
    seen.labels("strokes", 4, 4)
    combo = seen.combo("Annotation of pair 1")
    assert seen.texts(combo) == ["strokes"]
    seen.widget.exclude = lambda layer: layer.name == "strokes"
    assert seen.texts(combo) == ["prediction"]


def test_the_user_chooses(seen: Seen) -> None:
    first, second = seen.image("first"), seen.image("second", 5, 5)
    note, fitting = seen.labels("note"), seen.labels("fitting", 5, 5)
    seen.choose(seen.combo("Image of pair 1"), "second")
    assert seen.widget.pairs() == [Pair((second,), fitting)]
    seen.choose(seen.combo("Annotation of pair 1"), "note")
    assert seen.widget.pairs() == [Pair((second,), note)]
    seen.choose(seen.combo("Image of pair 1"), "first")
    assert seen.widget.pairs() == [Pair((first,), note)]
    assert seen.changed[-1] == [Pair((first,), note)]


def test_new_asks_for_an_annotation_of_its_row(seen: Seen) -> None:
    images = [seen.image("a"), seen.image("b")]
    seen.press("Add pair")
    seen.press("New annotation for pair 2")
    assert seen.wanted == [1]
    assert seen.widget.images(1) == (images[1],)
    note = seen.labels("note")  # the first row, of the same shape, takes it ...
    seen.widget.set_annotation(1, note)  # ... and must give it back
    assert [pair.annotation for pair in seen.widget.pairs()] == [None, note]


def test_a_further_pair_takes_what_is_free(seen: Seen) -> None:
    images = [seen.image(name) for name in "ab"]
    notes = [seen.labels(name) for name in "ab"]
    seen.press("Add pair")
    expected = [Pair((i,), n) for i, n in zip(images, notes, strict=True)]
    assert seen.widget.pairs() == expected
    seen.press("Add pair")
    assert seen.widget.pairs() == expected  # the empty row is left out
    third = seen.image("c", 3, 3)
    assert seen.widget.pairs() == [*expected, Pair((third,), None)]


def test_a_pair_is_removed_but_not_the_first(seen: Seen) -> None:
    images = [seen.image(name) for name in "abc"]
    seen.press("Add pair")
    seen.press("Add pair")
    seen.press("Remove pair 2")
    assert [pair.images for pair in seen.widget.pairs()] == [
        (images[0],),
        (images[2],),
    ]
    seen.press("New annotation for pair 2")
    assert seen.wanted == [1]
    seen.press("Remove pair 2")
    buttons = [b.text() for b in seen.widget.findChildren(QPushButton) if b.isVisible()]
    assert buttons == ["New", "+ Add pair"]


def test_a_removed_layer_empties_its_combo(seen: Seen) -> None:
    image, note = seen.image("cells"), seen.labels("strokes")
    seen.image("other")
    seen.layers.remove(note)
    assert seen.widget.pairs() == [Pair((image,), None)]
    seen.layers.remove(image)
    assert seen.widget.pairs() == []
    assert seen.combo("Image of pair 1").currentIndex() == -1
    assert not seen.button("New annotation for pair 1").isEnabled()
    seen.layers.clear()
    assert seen.combo("Image of pair 1").count() == 0


def test_names_and_order_follow_and_the_choice_stays(seen: Seen) -> None:
    image, note = seen.image("a"), seen.labels("strokes")
    seen.image("b")
    combo = seen.combo("Image of pair 1")
    seen.changed.clear()
    image.name = "renamed"
    assert seen.texts(combo) == ["renamed", "b"]
    seen.layers.move(0, 3)
    assert seen.texts(combo) == ["b", "renamed"]
    assert combo.currentText() == "renamed"
    assert seen.widget.pairs() == [Pair((image,), note)]
    assert seen.changed == []


def test_two_layers_of_one_name_are_told_apart(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen.layers, "_coerce_name", lambda name, *_: name, False)
    seen.image("twin")
    second = seen.image("b")
    second.name = "twin"
    combo = seen.combo("Image of pair 1")
    assert seen.texts(combo) == ["twin", "twin"]
    combo.showPopup()
    combo.view().setCurrentIndex(combo.model().index(1, 0))
    seen.bot.keyClick(combo.view(), Qt.Key.Key_Return)
    assert seen.widget.pairs() == [Pair((second,), None)]


def test_selected_images_of_one_shape_can_be_channels(seen: Seen) -> None:
    red, green = seen.image("red"), seen.image("green")
    odd, colour = seen.image("odd", 3, 3), seen.image("rgb", 8, 9, 3, rgb=True)
    combo = seen.combo("Image of pair 1")
    seen.layers.selection = {red, odd}
    assert combo.count() == 4
    seen.layers.selection = {colour, seen.image("rgb 2", 8, 9, 3, rgb=True)}
    assert combo.count() == 5
    seen.layers.selection = {green, red}
    assert seen.texts(combo)[-1] == "red + green (channels)"
    seen.choose(combo, "red + green (channels)")
    assert seen.widget.pairs() == [Pair((red, green), None)]
    seen.layers.selection = {odd}
    assert combo.currentText() == "red + green (channels)"  # while it is chosen
    seen.layers.remove(green)
    assert seen.widget.pairs() == []


def test_a_proxy_of_the_viewer_gives_raw_layers(qtbot: QtBot) -> None:
    viewer = ViewerModel()
    image = viewer.add_image(np.zeros((8, 9)))
    widget = PairTable(PublicOnlyProxy(viewer))
    qtbot.addWidget(widget)
    assert widget.pairs()[0].images[0] is image
    note = viewer.add_labels(np.zeros((8, 9), np.uint8))
    widget.set_annotation(0, PublicOnlyProxy(note))
    assert widget.pairs()[0].annotation is note
    widget.close_events()


def test_nothing_is_heard_after_the_end(seen: Seen) -> None:
    image = seen.image("a")
    emitters = (
        seen.layers.events.inserted,
        seen.layers.events.removed,
        seen.layers.events.reordered,
        seen.layers.selection.events.changed,
        image.events.name,
    )
    before = [len(emitter.callbacks) for emitter in emitters]
    seen.widget.close_events()
    assert [len(e.callbacks) for e in emitters] == [n - 1 for n in before]
    image.name = "b"
    seen.image("c")
    assert seen.texts(seen.combo("Image of pair 1")) == ["a"]
    seen.widget.close_events()  # twice does no harm


def test_nothing_keeps_it_alive(qtbot: QtBot) -> None:  # noqa: ARG001
    viewer = ViewerModel()
    widget = PairTable(viewer)
    viewer.add_image(np.zeros((8, 9)), name="a")  # napari would read our variables
    widget._add.click()
    widget.close_events()
    alive = weakref.ref(widget)
    del widget
    gc.collect()
    assert alive() is None


def test_a_name_is_never_markup_and_never_wide(seen: Seen) -> None:
    seen.image("<img src='file:///x'>" + 200 * "x")
    combo = seen.combo("Image of pair 1")
    assert len(combo.currentText()) == 64
    assert "<img" not in combo.toolTip()
    assert seen.widget.minimumSizeHint().width() <= 338


def test_a_name_is_one_line() -> None:
    assert plain("a\nb\u202ec") == "a b c"


def test_at_most_three_rows_are_visible(seen: Seen) -> None:
    area = seen.widget.findChild(QScrollArea)
    heights = []
    for _ in range(5):
        QApplication.processEvents()
        heights.append(area.height())
        seen.press("Add pair")
    assert heights[0] <= 30
    assert heights[0] < heights[1] < heights[2] <= 94
    assert heights[2] == heights[3] == heights[4]
    last = seen.button("Remove pair 6")
    seen.bot.waitUntil(lambda: not last.visibleRegion().isEmpty())


def test_the_wheel_scrolls_the_dock_only(seen: Seen) -> None:
    seen.image("a")
    seen.image("b")
    combo = seen.combo("Image of pair 1")
    combo.setFocus()
    event = QWheelEvent(
        QPointF(5, 5), QPointF(5, 5), QPoint(0, -120), QPoint(0, -120), LEFT,
        Qt.KeyboardModifier.NoModifier, Qt.ScrollPhase.NoScrollPhase, False,
    )  # fmt: skip
    QApplication.sendEvent(combo, event)
    assert combo.currentText() == "a"


def test_every_control_is_reached_by_tab_in_order(seen: Seen) -> None:
    seen.image("a")
    seen.image("b")
    seen.press("Add pair")
    seen.widget.activateWindow()
    seen.combo("Image of pair 1").setFocus()
    seen.bot.waitUntil(seen.combo("Image of pair 1").hasFocus)
    met = []
    for _ in range(8):
        control = QApplication.focusWidget()
        assert control.toolTip()
        met.append(control.accessibleName())
        seen.bot.keyClick(control, Qt.Key.Key_Tab)
    one = ["Image of pair 1", "Annotation of pair 1", "New annotation for pair 1"]
    two = ["Image of pair 2", "Annotation of pair 2", "New annotation for pair 2"]
    assert met == [*one, *two, "Remove pair 2", "Add pair"]
