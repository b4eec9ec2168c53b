"""Registries: skopeo copies an image, by the digest of its manifest, into an OCI layout."""

import hashlib
import json
import os
import pwd
import re
import subprocess
from pathlib import Path
from typing import Any

from supercloud.model.errors import Denied, Invalid, NoResources, NotFound, Temporary
from supercloud.upper.environments.layouts import for_this_platform, open_layout
from supercloud.upper.environments.limits import Limits
from supercloud.upper.environments.references import Reference
from supercloud.upper.environments.sources import Source, check_digest, load_object
from supercloud.upper.platform.image.tools import ToolTree

_INSPECT_TIMEOUT_S = 60
_COPY_TIMEOUT_S = 1800
# Where credentials, proxies and certificates are found; nothing else of our environment.
_ENVIRONMENT = [
    "HOME",
    "XDG_RUNTIME_DIR",
    "REGISTRY_AUTH_FILE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
]
_POLICY = {"default": [{"type": "insecureAcceptAnything"}]}  # signatures are not asked for
_NOT_FOUND = ("manifest unknown", "name unknown", "not found", "name_unknown", "manifest_unknown")
_DENIED = ("unauthorized", "denied", "authentication required")
_OURS = ("executable file not found",)  # a helper for credentials: the registry said nothing
_FATAL = re.compile(
    r'level=fatal msg="(?:Error parsing image name [^:]*://[^ ]*: )?((?:[^"\\]|\\.)*)"'
)


def resolve(
    reference: Reference,
    tools: ToolTree,
    scratch: Path,
    limits: Limits,
    timeout_s: float = _INSPECT_TIMEOUT_S,
) -> str:
    """The digest of the manifest (for linux/amd64) that the reference names now.

    ``timeout_s`` is for each answer of the registry.
    Raises ``NotFound``, ``Denied``, ``Temporary``, ``Unsupported``, ``NoResources``.
    """
    skopeo, name = _Skopeo(reference, scratch, tools), _suffix(reference)
    for _ in range(limits.index_depth):
        data = skopeo.run(timeout_s, "inspect", "--raw", f"docker://{reference.place}{name}")
        if len(data) > limits.manifest_bytes:
            raise NoResources("the image's manifest is too large", where=reference.text)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if name.startswith("@") and name != f"@{digest}":
            raise Invalid("the registry sent another manifest", where=reference.text)
        manifest = load_object(data, "the image's manifest", reference.text)
        if "manifests" not in manifest:
            _check_size(manifest, limits, reference.text)
            return digest
        entry = for_this_platform(manifest, reference.text)
        name = f"@{check_digest(entry.get('digest'), reference.text)}"
    raise Invalid("the image's indexes are nested too deep", where=reference.text)


def pull(
    reference: Reference, digest: str, tools: ToolTree, scratch: Path, limits: Limits
) -> Source:
    """Copy the image with that manifest into ``scratch`` and open it. Raises as ``resolve``."""
    layout = scratch / "pulled"
    skopeo = _Skopeo(reference, scratch, tools)
    source, target = f"docker://{reference.place}@{digest}", f"oci:{layout}:image"
    skopeo.run(_COPY_TIMEOUT_S, "copy", "--quiet", source, target)
    return open_layout(layout, "image", limits, where=reference.text, key=digest)


def _user() -> str:
    """Whose credentials are used."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def _suffix(reference: Reference) -> str:
    return f"@{reference.digest}" if reference.digest else f":{reference.tag}"


def _check_size(manifest: dict[str, Any], limits: Limits, where: str) -> None:
    """Refuse before anything large is fetched; what is fetched is measured again."""
    layers = manifest.get("layers")
    if not isinstance(layers, list):
        raise Invalid("the image's manifest lists no layers (schema 1?)", where=where)
    sizes = [
        layer["size"]
        for layer in layers
        if isinstance(layer, dict) and type(layer.get("size")) is int and layer["size"] >= 0
    ]
    if len(sizes) != len(layers):
        raise Invalid("the image's manifest has a malformed layer", where=where)
    if len(layers) > limits.layers or sum(sizes) > limits.total_bytes:
        raise NoResources("the image is over the limits for images", where=where)


class _Skopeo:
    """Runs skopeo for one reference; plain HTTP to this machine's own registries only."""

    def __init__(self, reference: Reference, scratch: Path, tools: ToolTree) -> None:
        self.reference, self.scratch = reference, scratch
        self.policy = scratch / "policy.json"
        self.policy.write_text(json.dumps(_POLICY))
        self.argv = tools.argv("skopeo")

    def run(self, timeout_s: float, command: str, *arguments: str) -> bytes:
        tls = ["--tls-verify=false"] if command == "inspect" else ["--src-tls-verify=false"]
        argv = [
            *self.argv,
            f"--policy={self.policy}",
            f"--tmpdir={self.scratch}",
            "--override-arch=amd64",
            "--override-os=linux",
            command,
            *(tls if self.reference.is_loopback else []),
            *arguments,
        ]
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            done = subprocess.run(
                argv, capture_output=True, timeout=timeout_s, check=False, env=environment
            )
        except subprocess.TimeoutExpired as error:
            raise Temporary(
                f"{self.reference.text}: the registry is too slow", delay_s=30
            ) from error
        if done.returncode != 0:
            raise self._error(done.stderr.decode(errors="replace"))
        return done.stdout

    def _error(self, said: str) -> Exception:
        where, host = self.reference.text, self.reference.place.partition("/")[0]
        fatal = _FATAL.search(said)
        reason = (fatal[1].replace('\\"', '"') if fatal else said.strip())[-500:]
        if any(text in said.lower() for text in _OURS):
            return Temporary(f"{where}: {reason}", delay_s=10)
        if any(text in said.lower() for text in _DENIED):
            hint = f"check the name; for a private image docker login {host}, as {_user()}"
            return Denied(f"the registry refuses: {reason}", where=where, hint=hint)
        if any(text in said.lower() for text in _NOT_FOUND):
            hint = f"check name and tag, or push the image to {host} first"
            return NotFound(f"the registry has no such image: {reason}", where=where, hint=hint)
        return Temporary(f"{where}: {reason}", delay_s=10)
