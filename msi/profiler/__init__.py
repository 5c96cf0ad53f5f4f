"""What the stages of a model take on this machine, measured through the runtime's own code: what msi-profile runs."""
