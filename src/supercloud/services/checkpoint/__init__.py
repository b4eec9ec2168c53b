"""Checkpoints of EEs and platforms in the user's object service, under keys of the user alone.

::

    service      calls of the user's domain: write, read, collect
      |
    store        begin (lease, ``writer``) · open (authenticate, ``reader``) · ``collect``
      |            parts -> trees -> 64 KiB blocks -> chunks, deduplicated, in packs
    backend      put-if-absent, get a range, list in order, delete: ``directory``, ``s3``

What the store sees is packs and records of random names, their sizes and times. What is trusted is
the user's key and, kept by the control plane, the newest (sequence, root) of each EE: ``Head``.
``collect`` tells why no live chunk is ever lost.
"""
