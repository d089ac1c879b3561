"""A desktop program around edge-memllm: a window in which a model goes on with what you write.

    python examples/desktop/app.py [MODEL ...]

Without a MODEL it offers the artifacts that lie in the folder `models` beside the program.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from window import Window
from worker import Worker


def main() -> int:
    """Open the window; return 0 when it was closed."""
    options = arguments()
    models = options.models or packed_models()
    window = Window(Worker(), models)
    if options.report is not None:
        window.demonstrate(options.text, lambda shown: write_report(options.report, shown))
    window.run()
    return 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="an artifact")
    check = parser.add_argument_group("to check a packed program")
    check.add_argument("--report", type=Path, help="go on with --text, write figures here as JSON")
    check.add_argument("--text", default="Once upon a time", help="what to go on with")
    return parser.parse_args()


def packed_models() -> list[Path]:
    """Return the artifacts in the folder `models` beside this program."""
    folder = Path(getattr(sys, "_MEIPASS", Path(__file__).parent)) / "models"
    return sorted(path.parent for path in folder.glob("*/manifest.json"))


def write_report(path: Path, shown: dict[str, object]) -> None:
    """Write what the window shows, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
