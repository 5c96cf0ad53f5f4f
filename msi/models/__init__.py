"""Model families: configuration, weight names, and the two halves of a layer."""
