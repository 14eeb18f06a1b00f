"""Memory of an engine that is not behind a descriptor: each kind of it in one file, listed in `registry`."""
