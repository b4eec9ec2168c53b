"""What is needed: from the roots of a recipe to all libraries and links that they lead to."""

import fnmatch
import posixpath
import re
from collections.abc import Iterable

from supercloud.model.errors import Permanent
from supercloud.upper.platform.image import elf
from supercloud.upper.platform.image.tree import Tree, resolve

_LIBRARY_DIRS = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/lib/x86_64-linux-gnu/swtpm",
)


def matching(tree: Tree, patterns: Iterable[str]) -> list[str]:
    """The paths that the patterns name; a pattern that matches nothing is an error."""
    found: list[str] = []
    for pattern in patterns:
        if not set("*?[") & set(pattern):
            hits = [pattern]
        else:
            matches = re.compile(fnmatch.translate(pattern)).match
            hits = [path for path, node in tree.items() if matches(path) and not node.is_dir]
        if not hits or resolve(tree, hits[0])[1] is None:
            raise Permanent(f"the recipe wants {pattern}, which no package has")
        found += hits
    return found


def close(tree: Tree, roots: Iterable[str]) -> Tree:
    """The part of ``tree`` that ``roots`` need. Raises ``Permanent`` on a missing library."""
    kept: Tree = {}
    todo = list(roots)
    while todo:
        path = todo.pop()
        links, real = resolve(tree, path)
        if real is None:
            raise Permanent(f"{path} leads nowhere")
        kept.update((passed, tree[passed]) for passed in links)
        if real not in kept:
            kept[real] = tree[real]
            todo += [_library(tree, name, real) for name in elf.needed(tree[real].data)]
    return kept


def _library(tree: Tree, name: str, wanted_by: str) -> str:
    if name.startswith("/"):
        return name
    for place in (*_LIBRARY_DIRS, posixpath.dirname(wanted_by)):
        path = f"{place}/{name}"
        if resolve(tree, path)[1] is not None:
            return path
    raise Permanent(f"{wanted_by} needs {name}, which no package has")
