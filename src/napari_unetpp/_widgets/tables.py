"""What the docks' small tables have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QAbstractItemView, QTableWidget, QTableWidgetItem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def set_up(
    table: QTableWidget,
    header: Sequence[tuple[str, str]],
    alignment: Callable[[int], Qt.AlignmentFlag],
) -> int:
    """Give a table low rows, one of which is selected, and a header that explains.

    Parameters
    ----------
    table : QTableWidget
        With as many columns as `header` has.
    header : sequence of (str, str)
        Text and tooltip of each column.
    alignment : callable
        Returns how a column is aligned.

    Returns
    -------
    height : int
        Of a row and of the header, in px.
    """
    table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
    table.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
    table.setTabKeyNavigation(False)  # Tab leaves the table
    table.setShowGrid(False)
    table.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    for column, (text, tip) in enumerate(header):
        item = QTableWidgetItem(text)
        item.setToolTip(tip)
        item.setTextAlignment(alignment(column))
        table.setHorizontalHeaderItem(column, item)
    height = table.fontMetrics().height() + 4
    table.verticalHeader().hide()
    table.verticalHeader().setMinimumSectionSize(height)
    table.verticalHeader().setDefaultSectionSize(height)
    table.horizontalHeader().setSectionsClickable(False)
    table.horizontalHeader().setHighlightSections(False)
    table.horizontalHeader().setFixedHeight(height)
    return int(height)
