"""The user's data protection service: NBD in front of a provider's backing file.

::

    service    calls of the user's domain, roots and evidence told
      engine   the compiled request path (``native/``: C, libcrypto), bound by ctypes
    audit      an independent reader of the same format in Python; ``cryptography``, not in images
      format   the format on the backing file, as data; the documentation of it

Why it is as it is: docs/decisions/0006-protection.md.
"""
