"""Starting a host: its share of the machine, its images, its grant manifest, and the keeper."""
