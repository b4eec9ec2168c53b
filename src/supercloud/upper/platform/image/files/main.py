"""Start a module of the image's own code: ``python3.13 -I -S -B main.py MODULE [ARGUMENT...]``.

Isolated mode has no path to our code, so this adds it and then does what ``-m`` would do, without
the price of ``runpy``.
"""

import sys
from importlib.machinery import PathFinder, SourceFileLoader, SourcelessFileLoader

_LOADERS = (SourcelessFileLoader, SourceFileLoader)


def _start() -> None:
    sys.path.insert(0, "/opt/supercloud/lib")
    sys.path.append("/usr/lib/python3/dist-packages")  # of the services; last, so it hides nothing
    sys.argv = sys.argv[1:]
    name = sys.argv[0]
    package = __import__(name.rpartition(".")[0], fromlist=["_"])
    spec = PathFinder.find_spec(name, package.__path__)
    if spec is not None and spec.submodule_search_locations is not None:
        package = __import__(name, fromlist=["_"])
        spec = PathFinder.find_spec(f"{name}.__main__", package.__path__)
    if spec is None or spec.origin is None or not isinstance(spec.loader, _LOADERS):
        sys.exit(f"{name}: no such module in this image")
    sys.argv[0] = spec.origin
    scope = sys.modules["__main__"].__dict__
    scope.update(__spec__=spec, __file__=spec.origin, __package__=spec.parent)
    code = spec.loader.get_code(spec.name)
    if code is not None:  # it has none only for a namespace package, refused above
        exec(code, scope)  # noqa: S102 -- this is what -m does


_start()
