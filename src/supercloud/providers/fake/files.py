"""How the pretended world is kept in files."""

import os


def write_private(path: str, data: bytes) -> None:
    """Put ``data`` at ``path`` (mode 0600), whole or not at all."""
    part = f"{path}.part"
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    os.replace(part, path)
