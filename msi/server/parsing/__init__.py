"""Answers taken apart while they come: reasoning, text, calls of tools. Pure; knows no HTTP and no engine."""
