"""Anthropic's Messages API: its bodies as chats, and a chat's answer as it writes it."""
