"""Agent sandbox: isolate commands on the host's own kernel, and log every one of them. See `docs/sandbox.md`."""
