"""An engine for programs without an event loop of their own: scripts and notebooks."""
