"""Compile the data protection engine: ``python scripts/engine.py [--out FILE] [--sanitize]``.

``uv sync`` and the wheel's build do it by way of ``hatch_build.py``. The same compiler makes the
same bytes, wherever the sources are.
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "supercloud" / "services" / "protection"
SOURCES = PACKAGE / "native"
ENGINE = PACKAGE / "libprotection.so"

FLAGS = (
    "-std=gnu17", "-O2", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wshadow", "-Wvla", "-Wstrict-prototypes", "-Werror",
)  # fmt: skip
HARDENING = (
    "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong", "-fstack-clash-protection",
    "-fcf-protection=full", "-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack",
)  # fmt: skip
REPRODUCIBLE = ("-Wl,--build-id=none", "-Wl,-s", f"-ffile-prefix-map={SOURCES}=.")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build(target: Path = ENGINE, sanitize: bool = False) -> Path:
    """Compile into ``target``, which appears whole or not at all."""
    flags = (*FLAGS, *(SANITIZERS if sanitize else (*HARDENING, *REPRODUCIBLE)))
    sources = [path.name for path in sorted(SOURCES.glob("*.c"))]
    compiler = os.environ.get("CC", "gcc")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".engine-") as place:
        made = Path(place) / target.name
        subprocess.run(
            [compiler, *flags, *sources, "-o", str(made), "-lcrypto"], cwd=SOURCES, check=True
        )
        made.chmod(0o644)
        made.replace(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ENGINE)
    parser.add_argument("--sanitize", action="store_true")
    options = parser.parse_args()
    print(build(options.out, options.sanitize))
