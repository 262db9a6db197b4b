"""OpenAI's Responses API: its bodies as chats, a chat's answer as it writes it, and what is kept."""
