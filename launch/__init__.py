"""msi-launch: starts instances on this machine, and single processes for clusters."""
