"""Our own code for an image: bytecode and data files, and one hash over their sources."""

import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import supercloud
from supercloud.model.errors import Permanent
from supercloud.upper.platform.image import bytecode
from supercloud.upper.platform.image import tree as trees
from supercloud.upper.platform.image.recipe import FILES, PYTHON
from supercloud.upper.platform.image.tools import ToolTree

PLACE = "opt/supercloud/lib/supercloud"
PACKAGE = Path(supercloud.__file__).parent
NOT_IN_IMAGES = {"__pycache__", "native"}  # by directory; the latter holds sources in C
# part -> what it is of no use without
COMPILED = {"services": "services/protection/libprotection.so"}


def sources(parts: Iterable[str], package: Path = PACKAGE) -> trees.Tree:
    """The files below ``package`` that ``parts`` name, at their place in the image.

    What is compiled is compiled already, by the installation. Permanent when it is missing.
    """
    found: trees.Tree = {}
    parts = tuple(parts)
    for part in parts:
        top = package / part
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and not NOT_IN_IMAGES & set(path.parts):
                name = path.relative_to(package).as_posix()
                found[f"{PLACE}/{name}"] = trees.file(path.read_bytes())
    for part, product in COMPILED.items():
        if part in parts and f"{PLACE}/{product}" not in found:
            raise Permanent(f"{product} was not compiled: scripts/engine.py does it")
    return found


def digest(tree: trees.Tree) -> str:
    """SHA-256 over paths and contents, in hex."""
    total = hashlib.sha256()
    for path in sorted(tree):
        content = hashlib.sha256(tree[path].data).hexdigest()
        total.update(f"{tree[path].mode:o} {content} {path}\n".encode())
    return total.hexdigest()


def compiled(tree: trees.Tree, tools: ToolTree) -> trees.Tree:
    """The tree with every ``.py`` replaced by its sourceless ``.pyc``."""
    python = {p: node for p, node in tree.items() if p.endswith(".py") and node.is_file}
    made = tools.run(
        Path(PYTHON).name,
        "-S",
        "-s",
        "-P",
        bytecode.PROGRAM,
        given=trees.to_tar(python) + trees.TAR_END,
    )
    result = {path: node for path, node in tree.items() if path not in python}
    with tarfile.open(fileobj=io.BytesIO(made)) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                result[member.name] = trees.file(content.read())
    return result


def runtime_files() -> trees.Tree:
    """The launcher, the same in every image."""
    return {"opt/supercloud/main.py": trees.file((FILES / "main.py").read_bytes())}


def l1_files() -> trees.Tree:
    """The launcher and process 1 of the platform."""
    init = trees.file((FILES / "l1init").read_bytes(), 0o755)
    return runtime_files() | {"usr/sbin/l1init": init}


def boot_init() -> trees.Node:
    """The first program of the initramfs."""
    return trees.file((FILES / "boot-init").read_bytes(), 0o755)
