"""The seam to hardware: ordered work, awaitable completion, linear layers in the layout a device likes."""
