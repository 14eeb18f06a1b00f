"""Memory providers: how the sidecar comes at the KV. One small file each; `choice` takes the first that works."""
