"""How an instance comes to be: its workers in this process, or in child processes."""
