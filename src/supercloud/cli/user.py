"""``supercloud``, the user's command line: entry point.

::

    user (main) -> commands (declarations) -> listing | inspect | apply | streams | terminal | ...
                                    all -> client (the API) -> start (the control plane, if need be)

Everything heavy is imported by the command that needs it: ``ps`` loads the standard library's
argument parser, JSON and sockets, and nothing else (a test lists it).
"""

import os
import sys

from supercloud.cli import commands
from supercloud.cli.failure import EXIT_INTERRUPTED, report


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status, by ``model.errors.STATUS`` when it fails."""
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments = commands.parse(words)
        status = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_gone()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last one, which shows no traceback to a user
        return report(error, as_json="--json" in words)
    return status or 0


def _reader_gone() -> int:
    """Whoever reads our output (``| head``) has seen enough: that is no error."""
    # Python flushes stdout once more at exit, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
