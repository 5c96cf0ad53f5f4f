"""Other servers of language models, run beside ours on the same checkpoint and cores."""
