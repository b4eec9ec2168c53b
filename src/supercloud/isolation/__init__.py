"""What each kind of domain may do, as tables, compiled for the core."""
