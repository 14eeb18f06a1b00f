"""Ways to move blocks: one file each, chosen at the handshake, one conformance suite (tests/sidecar_processes)."""
