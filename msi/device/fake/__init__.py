"""A GPU and cards that do not exist: late, out of order, and strict about who may touch what. For tests and tools.

    world = FakeWorld(seed)
    device = FakeDevice(world)          # as any device: queues, words, memory
    wire = Wire(world)                  # one direction between the cards of two devices

Nothing here takes time: of all that real hardware could do next, one scheduler picks something by the seed, on the
event loop, between steps of the host. So what is right on every seed waits for all that it must wait for, and a wait
that was left out gives wrong results on nearly any of them. What computes are the plain torch kernels.
"""
