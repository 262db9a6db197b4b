"""OpenAI's completions and chats, and vLLM's routes beside them: bodies, answers, streams."""
