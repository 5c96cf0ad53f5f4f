"""The expert worker's wing: waves, the server that runs them, and its half of the model."""
