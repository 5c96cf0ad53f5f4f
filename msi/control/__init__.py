"""The coordinator's wing: who is a member, which request goes to whom, and the messages about both."""
