"""The KV sidecar: one process beside every engine rank that moves KV blocks between engines."""
