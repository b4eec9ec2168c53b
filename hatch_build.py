"""The build hook: the wheel, and an editable installation, have the compiled protection engine."""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).parent


class EngineHook(BuildHookInterface[Any]):
    """Compiles ``libprotection.so`` into the package; the C sources stay out of the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the archive is written; ``version`` is ``standard`` or ``editable``."""
        del version
        engine: Path = runpy.run_path(str(HERE / "scripts" / "engine.py"))["build"]()
        build_data["artifacts"].append(str(engine.relative_to(HERE)))
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"  # ctypes: no Python ABI
