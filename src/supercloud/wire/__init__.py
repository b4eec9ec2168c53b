"""Where layers meet: frames, codec, peer, declared messages."""
