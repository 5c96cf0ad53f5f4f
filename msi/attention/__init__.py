"""The attention worker's wing: scheduler, lanes, KV blocks, sampler, and its half of the model."""
