"""Checkpoints of environments inside a platform: a short-lived process beside the agent.

::

    agent        stops and resumes environments; runs no line of what is here but ``requests``
      | JSON lines on standard input and output, one process a checkpoint or restore
    saver        ``take``: dirty pages (``tracking``), files (``trees``) -> the store's Writer
                 ``restore``: the store's Reader -> memory, files
      | S3 over TLS, through the link
    object store of the U-Cloud

The agent stays small and quick to start; what needs cryptography and compression is loaded here,
at a low priority, and its end by whatever means leaves nothing behind but files that the next one
removes.
"""
