"""The user's storage replication service: one volume on two or three devices at once.

::

    service     calls of the owner (the user's control plane, through its domain), what it is told
      front     an NBD server for whoever uses the volume: the block service
      mirror    the rules: what must be where before a request is answered; who counts as in sync
        lease   until when anything may be answered at all, and for ever no more
        members standings of the replicas as a table
        ranges  requests that overlap are served one after another, the same way everywhere
        regions which 64 KiB regions a replica lacks, in memory that outlives this process
      remote    an NBD client for one replica
      stream    bytes in and out of a socket on the reactor
      nbd       the protocol's numbers

Why it is as it is, and what the owner must keep to: docs/decisions/0013-replication.md.
"""
