"""Several engines behind one front door, through Ray Serve: `python -m deploy.replicas`; see docs/replicas.md."""
