"""`python -m napari_unetpp` is the command line."""

from __future__ import annotations

import sys

from napari_unetpp.cli import main

if __name__ == "__main__":
    sys.exit(main())
