"""What `tools/hostile.py` is made of: attacks, streams that must not notice, and the processes under attack."""
