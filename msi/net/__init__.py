"""Moving bytes: transports, slots, links, control sockets. Knows no layers, experts or requests."""
