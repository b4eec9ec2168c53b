"""A host that runs our Lower Layer, reached over the wire only, as a stranger would."""
