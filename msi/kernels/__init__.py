"""The operations of both halves as plain torch functions on tensors; they know nothing of msi.

These run on the CPU and are the truth that faster kernels for other devices are tested against.
"""

BLOCK_TOKENS = 16  # of a block of the KV cache; here, without torch, for those who only count blocks
