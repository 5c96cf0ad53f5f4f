"""The product under a virtual clock: real lanes, links, waves and workers on a simulated device and transport."""
