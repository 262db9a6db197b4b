"""How models write reasoning and tool calls, a file for each form; `names.py` has the table."""
