"""What `tools/hostile.py` and `tools/chaos.py` are made of.

Attacks, disasters, streams that must not notice, and the processes under attack.
"""
