"""``python -m supercloud.upper.platform.image build``."""

import argparse
import json
import sys
from pathlib import Path

from supercloud.model.errors import STATUS, SupercloudError, UserError, to_wire
from supercloud.upper.platform.image.build import PRODUCTS, build
from supercloud.upper.platform.image.tools import default_cache


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m supercloud.upper.platform.image")
    command = parser.add_subparsers(dest="command", required=True).add_parser("build")
    command.add_argument("--out", type=Path, required=True, help="directory for the products")
    command.add_argument("--cache", type=Path, default=default_cache())
    command.add_argument("--product", choices=(*PRODUCTS, "all"), default="all")
    command.add_argument("--locked", action="store_true", help="refuse to resolve anew")
    command.add_argument("--update-lock", action="store_true", help="resolve and write lock.json")
    command.add_argument("--json", action="store_true", help="print the manifest on stdout")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    given = _arguments(argv)
    try:
        manifest = build(
            given.out.absolute(),
            cache=given.cache.absolute(),
            product=given.product,
            locked=given.locked,
            update_lock=given.update_lock,
        )
    except SupercloudError as error:
        wire = to_wire(error)
        hint = f"\n  {error.hint}" if isinstance(error, UserError) and error.hint else ""
        sys.stderr.write(f"error: {wire['message']}{hint}\n")
        return STATUS[wire["code"]][1]
    if given.json:
        print(json.dumps(manifest, indent=1, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
