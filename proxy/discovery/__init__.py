"""Where instances are found: host names (`dns.py`), the pods of a Kubernetes cluster (`kubernetes.py`)."""
