"""The user's object storage: an S3 server, whose disk shows neither contents nor names.

::

    EE -- TLS --> gate (ours: one way in, quotas) --> weed (S3, on loopback) --> provider's disk
                    |                                   |                        volumes: ciphertext
                  usage <-- metadata (ours, RESP) <-----+ names, chunk keys      journal: ciphertext

``weed`` encrypts each chunk under a key of its own and keeps that key, with the name, in its
metadata store. That store is ours: tables in memory over a journal of authenticated records. So
whatever lies on the provider's disk is ciphertext, a changed or older chunk fails its tag, and
what a bucket holds is known at each moment. No mount, no device and no privilege is needed.
"""
