"""Text before and after the tokens: prompts, pieces of answers, stop strings."""
