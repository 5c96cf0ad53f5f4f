"""`msi-launch --check`: what would stand in the way of a start, found before there is one."""
